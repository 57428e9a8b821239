"""`cllm models`, `cllm pull` and `cllm info`: which models there are, and what becomes of one on this machine.

torch is imported when a command runs, so that `cllm --help` stays quick.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import httpx
import msgspec
import typer
from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from rich.console import Console

from cllm_core.cli.command import exit_with
from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError

if TYPE_CHECKING:
    from cllm_core.info import ModelInfo

_MIB = 1024**2
_GIB = 1024**3
_TIMEOUT_SECONDS = 10.0


def models(
    *,
    url: Annotated[
        str | None,
        typer.Option(
            help="Server to ask for what it serves, as http://127.0.0.1:8000. Left out: only models of this machine.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for that server, where it needs one.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """List the models that can be served by name: built in, in the Hub's cache, and at a running server."""
    found = [*_built_in(), *_cached(), *(_served(url, api_key) if url else ())]
    if as_json:
        sys.stdout.write("".join(msgspec.json.encode(model).decode() + "\n" for model in found))
    else:
        sys.stdout.write(_as_table(["MODEL", "WHERE", "WHAT"], [[m.name, m.place, m.description] for m in found]))


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id of a model or an adapter, or a built-in name.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Fetch code that comes with the checkpoint, too.")
    ] = False,
) -> None:
    """Fetch a model, with its base where it is an adapter, so that it can be served without a network."""
    from cllm_core.models.source import resolve_source  # noqa: PLC0415

    config = EngineConfig(model=model, revision=revision, trust_remote_code=trust_remote_code)
    console = Console(stderr=True)
    try:
        with console.status(f"fetching {model}") as status:
            source = resolve_source(config, lambda stage, fraction: status.update(f"{stage} ({fraction:.0%})"))
    except CllmError as error:
        exit_with(str(error))
    if source.adapter is not None:
        sys.stdout.write(f"{source.adapter}\n")
    sys.stdout.write(f"{source.checkpoint.folder / (source.checkpoint.gguf_file or '')}\n")


def info(model: EngineConfig) -> None:
    """Load a model and tell how this machine serves it: architecture, memory, and the path that each part takes."""
    from cllm_core.engine.build import build_engine  # noqa: PLC0415

    console = Console(stderr=True)
    try:
        with console.status("loading") as status:
            engine = build_engine(model, lambda stage, fraction: status.update(f"{stage} ({fraction:.0%})"))
    except CllmError as error:
        exit_with(str(error))
    sys.stdout.write(_as_table(None, [[name, fact] for name, fact in describe(engine.info).items()]))


def describe(info: "ModelInfo") -> dict[str, str]:
    """What there is to know of a loaded model, fact by fact."""
    cache_tokens = info.num_cache_blocks * info.cache_block_size
    facts = {
        "model": info.name,
        "architecture": info.architecture,
        "parameters": f"{info.num_parameters / 1e6:,.0f} million",
        "computes in": f"{info.number_format} on {info.device}",
        "trained for": info.domain or "no domain: a plain model",
        "block length": f"{info.block_length} tokens",
        "context": f"{info.max_model_len} tokens",
        "weights": f"{info.weight_bytes / _MIB:,.0f} MiB",
        "KV cache": f"{info.cache_bytes / cache_tokens / 1024:.1f} KiB for a token, "
        f"{info.cache_bytes / _GIB:.2f} GiB for {cache_tokens:,} tokens",
    }
    if info.gated is not None:
        facts["gated adapter"] = f"{info.gated.path}, rank {info.gated.rank}, {info.gated.num_bytes / _MIB:,.0f} MiB"
    if info.paths is not None:
        facts |= {name.replace("_", " "): str(getattr(info.paths, name)) for name in info.paths.__struct_fields__}
    return facts


class _Found(msgspec.Struct, frozen=True):
    """A model that can be named."""

    name: str
    place: str
    description: str


def _built_in() -> Iterable[_Found]:
    from cllm_core.models.cllm_json import read_card  # noqa: PLC0415
    from cllm_core.models.embedded import EMBEDDED_NAME, has_embedded  # noqa: PLC0415
    from cllm_core.models.shipped import DEFAULT_MODEL, SHIPPED_FOLDER, shipped_names  # noqa: PLC0415

    if not has_embedded():
        return
    for name in shipped_names():
        card = read_card(SHIPPED_FOLDER / name)
        domain = card.domain if card and card.domain else "adapter"
        domain = f"{domain}, proposes for its base" if card and card.gated else domain
        yield _Found(name, "built in", f"{domain}, the default" if name == DEFAULT_MODEL else domain)
    yield _Found(EMBEDDED_NAME, "built in", "the base of the others, a plain model")


def _cached() -> Iterable[_Found]:
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            yield _Found(repo.repo_id, "Hub cache", f"{repo.size_on_disk / _GIB:.2f} GiB")


def _served(url: str, api_key: str | None) -> Iterable[_Found]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        response = httpx.get(address, headers=headers, timeout=_TIMEOUT_SECONDS)
        response.raise_for_status()
        cards = response.json()["data"]
        return [_Found(card["id"], "served", f"by {url}") for card in cards]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        exit_with(f"--url {url}: the server cannot be asked ({error}); check the address and --api-key")


def _as_table(head: list[str] | None, rows: list[list[str]]) -> str:
    """Lines of columns, all but the last padded to their widest cell."""
    lines = [*([head] if head else []), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)] if lines else []
    padded = [[*(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]] for line in lines]
    return "".join("  ".join(line) + "\n" for line in padded)
