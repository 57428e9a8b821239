"""Settings of `cllm export`: frozen, refused where they are built. No torch in here, so that `--help` is instant."""

from pathlib import Path
from typing import Literal

import msgspec

from cllm_core.errors import ConfigError

ExportFormat = Literal["safetensors", "gguf"]
ExportDType = Literal["auto", "bf16", "f16", "f32"]


class ExportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to write, and where.

    Attributes:
        model: Hub id, folder, .gguf file, adapter, or the name of a model that comes with this package.
        output: folder for safetensors, file for GGUF; must not exist.
        adapter: PEFT adapter (folder or Hub id) to merge, where `model` is not one itself.
        revision: Hub revision of the model.
        format: safetensors is a Hugging Face folder, gguf one file.
        dtype: of the matrices; auto keeps the checkpoint's, and takes bf16 where it is quantised.
        layers: how many of the first layers to keep; None keeps all.
        trust_remote_code: let transformers run code that comes with the checkpoint.
    """

    model: str
    output: Path
    adapter: str | None = None
    revision: str | None = None
    format: ExportFormat = "safetensors"
    dtype: ExportDType = "auto"
    layers: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers={self.layers}: must be >= 1; leave it out to keep all")
        if self.format == "gguf" and self.output.suffix != ".gguf":
            raise ConfigError(f"output={self.output}: format gguf writes one file; give a name that ends in .gguf")
        if self.format == "safetensors" and self.output.suffix == ".gguf":
            raise ConfigError(f"output={self.output}: format safetensors writes a folder; give format gguf for a file")
        if self.output.exists():
            raise ConfigError(f"output={self.output}: exists already; name another one, or remove it")
