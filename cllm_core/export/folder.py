"""A model as a Hugging Face folder: what transformers 4 and 5, vLLM and `cllm serve` load."""

import json
import shutil
from pathlib import Path

from cllm_core.export.merged import MergedModel
from cllm_core.models.cllm_json import write_card
from cllm_core.models.embedded import EMBEDDED_HUB_ID, EMBEDDED_NAME
from cllm_core.models.sampling_defaults import JSON_FIELDS, read_sampling_defaults
from cllm_core.models.saving import save_model, save_tokenizer

_CARD = "README.md"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"


def write_folder(merged: MergedModel, folder: Path) -> None:
    """Write weights (safetensors), config, tokenizer, chat template, generation config, cllm.json and model card.

    Args:
        merged: the model.
        folder: does not exist.
    """
    folder.mkdir()
    save_model(merged.model, folder)
    save_tokenizer(merged.tokenizer, folder)
    for weights in folder.glob("*.safetensors"):  # its library lets the owner alone read them
        shutil.copymode(folder / _CONFIG, weights)
    _complete_generation_config(folder / _GENERATION_CONFIG, merged)
    if merged.source.card is not None:
        write_card(folder, merged.source.card)
    for origin in _origins(merged):
        for licence in (path for pattern in _LICENCES for path in origin.glob(pattern)):
            shutil.copyfile(licence, folder / licence.name)
    (folder / _CARD).write_text(model_card(merged), encoding="utf-8")


def model_card(merged: MergedModel) -> str:
    """The README.md: what was merged and how to serve it, and then what the model's own card says."""
    source = merged.source
    base = EMBEDDED_HUB_ID if source.base_name == EMBEDDED_NAME else source.base_name
    lines = [
        "---",
        *([] if Path(base).exists() else [f"base_model: {base}"]),  # the Hub's field: no path of this machine
        *(["tags: [consistency-llm, jacobi-decoding]"] if source.card is not None else []),
        "library_name: transformers",
        "---",
        "",
        f"# {Path(source.name).name}",
        "",
        f"{_origin(merged)}, written by `cllm export` as {str(merged.model.dtype).removeprefix('torch.')}.",
        "",
        "Serve it with `cllm serve FOLDER`; any program that loads Hugging Face folders can use it, too.",
    ]
    if source.card is not None and source.card.block_length is not None:
        lines += ["", f"Trained for Jacobi decoding with blocks of {source.card.block_length} tokens (`cllm.json`)."]
    if merged.num_layers is not None:
        lines += ["", f"The first {merged.num_layers} layers alone: train it before use (`cllm sft --teacher`)."]
    own = _own_card(merged)
    return "\n".join([*lines, "", *(["## The card of what was exported", "", own, ""] if own else [])])


def _complete_generation_config(path: Path, merged: MergedModel) -> None:
    """State all end tokens in one place, and how a GGUF file wants to be sampled.

    By hand: transformers refuses to save many a published config changed.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    ids = list(merged.eos_token_ids)
    values["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    if merged.source.checkpoint.gguf_file is not None:
        stated = read_sampling_defaults(merged.source.checkpoint).values()
        values |= {name: stated[field] for name, field in JSON_FIELDS.items() if field in stated}
        if stated.get("temperature"):
            values["do_sample"] = True  # transformers looks at the rest only then
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _origin(merged: MergedModel) -> str:
    """What the weights are, in words; folders are named without the path to them."""
    base = Path(merged.source.base_name).name
    return f"The model {base}" if merged.source.adapter is None else f"{base} with an adapter merged into its weights"


def _origins(merged: MergedModel) -> list[Path]:
    """Folders whose files belong to the model, the adapter's last."""
    adapter = merged.source.adapter
    return [merged.source.checkpoint.folder, *([adapter] if adapter is not None else [])]


def _own_card(merged: MergedModel) -> str | None:
    """Text of the exported adapter's or model's README.md, without the Hub's metadata on top."""
    path = _origins(merged)[-1] / _CARD
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return text.strip()
