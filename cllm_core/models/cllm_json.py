"""`cllm.json`: what makes a checkpoint or an adapter a Consistency LLM, in a small file beside its weights."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from cllm_core.config import MAX_BLOCK_LENGTH
from cllm_core.errors import ConfigError, ModelLoadError

CARD_FILE = "cllm.json"
FORMAT_VERSION = 1


class CllmCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of `cllm.json`. Fields it does not know are passed over, so that tools may add their own.

    Attributes:
        format_version: of the file; a reader refuses a newer one than it knows.
        block_length: Jacobi block length n that the model was trained for, in tokens.
        domain: what it was trained for, in a word or two ("text-to-sql").
        base: model that it was trained from, as a Hub id or a path.
        gated: of an adapter that only proposes, so that it is never merged; block_length is that of its noise.
    """

    format_version: int
    block_length: int | None = None
    domain: str | None = None
    base: str | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ConfigError(
                f"format_version={self.format_version}: this version reads 1..{FORMAT_VERSION}; upgrade cllm-server"
            )
        if self.block_length is not None and not 1 <= self.block_length <= MAX_BLOCK_LENGTH:
            raise ConfigError(f"block_length={self.block_length}: must be in 1..{MAX_BLOCK_LENGTH}")


PUBLISHED: Mapping[str, CllmCard] = {
    f"JacobiForcing/JacobiForcing_{size}_v1": CllmCard(
        format_version=FORMAT_VERSION, block_length=64, domain=domain, base=base
    )
    for size, domain, base in (
        ("Coder_7B", "code", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("Math_7B", "math", "Qwen/Qwen2.5-Math-7B-Instruct"),
    )
}
"""Consistency LLMs on the Hub that have no cllm.json, by Hub id: those of Jacobi Forcing (arXiv:2512.14681), whose
authors recommend blocks of 64 tokens, and trained on blocks of 32."""


def read_card(folder: Path) -> CllmCard | None:
    """The folder's `cllm.json`, None where it has none.

    Raises:
        ModelLoadError: the file cannot be read, is not JSON, or a value is wrong.
    """
    path = folder / CARD_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=CllmCard)
    except (OSError, msgspec.DecodeError, ConfigError) as error:
        raise ModelLoadError(f"{path}: {error}; correct the file or remove it") from error


def write_card(folder: Path, card: CllmCard) -> None:
    """Write `cllm.json` to an existing folder."""
    (folder / CARD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(card)) + b"\n")
