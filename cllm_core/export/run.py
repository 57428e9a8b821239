"""`cllm export`, from the settings to the finished folder or file."""

import tempfile
from pathlib import Path

from cllm_core.errors import ConfigError
from cllm_core.export.config import ExportConfig
from cllm_core.export.folder import write_folder
from cllm_core.export.gguf_file import write_gguf
from cllm_core.export.merged import MergedModel, read_merged
from cllm_core.models.cllm_json import CARD_FILE, read_card, write_card
from cllm_core.models.progress import OnProgress

_WRITING_SHARE = 0.9


def export_model(config: ExportConfig, on_progress: OnProgress) -> Path:
    """Write the model that `config` names; returns the folder or file.

    Everything is written beside the output and moved there at the end, so that an interrupted export leaves nothing.

    Raises:
        ModelLoadError: the model cannot be read, or not be written in this format.
        ConfigError: the output cannot be written, or a GGUF file would lie beside another model's cllm.json.
    """
    merged = read_merged(config, on_progress)
    on_progress("writing", _WRITING_SHARE)
    output = config.output.absolute()
    if config.format == "gguf":
        _require_own_card(merged, output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            written = Path(scratch) / output.name
            if config.format == "gguf":
                write_gguf(merged, written)
                _write_card_beside(merged, output)
            else:
                write_folder(merged, written)
            written.rename(output)
    except OSError as error:
        raise ConfigError(f"output={config.output}: cannot be written ({error}); name a place with room") from error
    return config.output


def _require_own_card(merged: MergedModel, output: Path) -> None:
    """GGUF has no place for cllm.json, so the file is read with the one beside it."""
    card = read_card(output.parent)
    if card is not None and card != merged.source.card:
        raise ConfigError(
            f"output={output}: {output.parent / CARD_FILE} belongs to another model, whose block length and domain the "
            "file would get; name a file in another folder"
        )


def _write_card_beside(merged: MergedModel, output: Path) -> None:
    """One that is there already says the same, and may hold what other tools added."""
    if merged.source.card is not None and not (output.parent / CARD_FILE).exists():
        write_card(output.parent, merged.source.card)
