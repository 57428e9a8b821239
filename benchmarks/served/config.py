"""Settings of the comparison; each field's description is the help text of its command line option."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from cllm_core.errors import ConfigError


class ServedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to compare, with which prompts, under which loads."""

    model: Annotated[str, Meta(description="Folder written by `cllm export`, or whatever `cllm serve` loads.")]
    output: Annotated[Path, Meta(description="Folder for served.json, served.md, plots and the servers' logs.")]
    ar: Annotated[bool, Meta(description="This server, token by token.")] = True
    jacobi: Annotated[bool, Meta(description="This server with Jacobi decoding.")] = True
    engine_alone: Annotated[bool, Meta(description="The engine without HTTP, at concurrency 1.")] = True
    block_length: Annotated[int | None, Meta(description="Of Jacobi decoding. Left out: the model's.")] = None
    llama_server: Annotated[Path | None, Meta(description="The program llama-server of llama.cpp; needs --gguf.")] = (
        None
    )
    gguf: Annotated[Path | None, Meta(description="The same model by `cllm export --format gguf`.")] = None
    llama_args: Annotated[str, Meta(description="Further flags of llama-server, in one word.")] = ""
    llama_variants: Annotated[
        str,
        Meta(
            description="llama-server measured again with further flags, such as those of its drafts: NAME=FLAGS, with "
            "semicolons between."
        ),
    ] = ""
    context: Annotated[int, Meta(description="Tokens of one request in llama-server.")] = 2048
    transformers: Annotated[
        Path | None, Meta(description="The program `transformers`, for `transformers serve`; MODEL has to be a folder.")
    ] = None
    transformers_args: Annotated[str, Meta(description="Further flags of `transformers serve`, in one word.")] = ""
    urls: Annotated[
        str, Meta(description="Servers that run already: NAME=BASE_URL, with commas between. Key: OPENAI_API_KEY.")
    ] = ""
    prompts: Annotated[Path | None, Meta(description='JSON lines with a "prompt" each. Left out: a few questions.')] = (
        None
    )
    spider: Annotated[Path | None, Meta(description="Spider's dev.json in place of --prompts; needs --tables.")] = None
    tables: Annotated[Path | None, Meta(description="Spider's tables.json.")] = None
    limit: Annotated[int | None, Meta(description="Use only so many prompts.")] = None
    concurrency: Annotated[str, Meta(description="Requests in flight, a load for each.")] = "1,2,4,8,16,32"
    requests: Annotated[int, Meta(description="Requests of a load, at least.")] = 16
    rounds: Annotated[int, Meta(description="Times everything is measured.")] = 3
    max_tokens: Annotated[int, Meta(description="Output limit in tokens.")] = 128
    num_threads: Annotated[int | None, Meta(description="CPU threads of each server that is started.")] = None

    def __post_init__(self) -> None:
        for name in ("limit", "requests", "rounds", "max_tokens", "num_threads", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be >= 1")
        if (self.llama_server is None) != (self.gguf is None):
            raise ConfigError("llama_server and gguf belong together: give both, or neither")
        if (self.spider is None) != (self.tables is None):
            raise ConfigError("spider and tables belong together: give both, or neither")
        if self.spider is not None and self.prompts is not None:
            raise ConfigError(f"prompts={self.prompts}: cannot be used beside spider; give one of them")
        if self.transformers is not None and not Path(self.model).is_dir():
            raise ConfigError(f"model={self.model}: transformers serve needs a folder; write one with `cllm export`")
        for path in (self.llama_server, self.gguf, self.transformers):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path}: no such file; name the program or model itself")
        if not (self.concurrencies and (self.ar or self.jacobi or self.llama_server or self.transformers or self.urls)):
            raise ConfigError("nothing to compare: leave at least one server and one concurrency in")
        _ = self.named_urls, self.named_llama_variants

    @property
    def concurrencies(self) -> list[int]:
        """The loads, ascending; ConfigError where they are no numbers."""
        try:
            numbers = sorted({int(word) for word in self.concurrency.split(",") if word.strip()})
        except ValueError as error:
            raise ConfigError(f"concurrency={self.concurrency!r}: must be numbers with commas between") from error
        if numbers and numbers[0] < 1:
            raise ConfigError(f"concurrency={self.concurrency!r}: every one must be >= 1")
        return numbers

    @property
    def named_llama_variants(self) -> dict[str, str]:
        """Name in tables -> flags; ConfigError where one is malformed."""
        named = {}
        for word in filter(None, (part.strip() for part in self.llama_variants.split(";"))):
            name, _, flags = word.partition("=")
            if not name.strip() or not flags.strip():
                raise ConfigError(f"llama_variants={word!r}: must be NAME=FLAGS, such as ngram=--spec-type ngram-mod")
            named[f"llama-server, {name.strip()}"] = flags.strip()
        return named

    @property
    def named_urls(self) -> dict[str, str]:
        """Name -> base URL of the servers that run already; ConfigError where one is malformed."""
        named = {}
        for word in filter(None, (part.strip() for part in self.urls.split(","))):
            name, _, url = word.partition("=")
            if not name or not url.startswith(("http://", "https://")):
                raise ConfigError(f"urls={word!r}: must be NAME=BASE_URL, such as other=http://127.0.0.1:8080/v1")
            named[name] = url
        return named
