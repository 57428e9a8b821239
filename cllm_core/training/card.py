"""The facts of a training and the model card made of them. No torch in here: `cllm card` rewrites a card at once."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cllm_core.errors import DataError

FACTS_FILE = "training.json"
CARD_FILE = "README.md"
_NO_RESULTS = "None yet: `cllm eval` measures them and `cllm card` puts them here."


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to know of a run.

    Attributes:
        title: heading of the card.
        settings: all of the run, as plain data, without paths of this machine.
        data: name or file of the data.
        num_examples, num_left_out: used, and left out because they were too long.
        num_steps: optimiser steps.
        num_tokens: packed tokens trained on, all epochs.
        seconds: wall time of the training, interruptions not counted.
        final_losses: means over the last report.
        machine: device, processor and versions.
        gated: whether it is a gated adapter.
        adapter_scale: what the adapter was multiplied by after the training.
    """

    title: str
    base: str
    domain: str | None
    block_length: int | None
    settings: dict[str, object]
    data: str
    num_examples: int
    num_left_out: int
    num_steps: int
    num_tokens: int
    seconds: float
    final_losses: dict[str, float]
    machine: str
    gated: bool = False
    adapter_scale: float = 1.0


def write_facts(folder: Path, facts: TrainingFacts) -> None:
    """Write training.json, and the card without results."""
    (folder / FACTS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts)) + b"\n")
    (folder / CARD_FILE).write_text(model_card(facts), encoding="utf-8")


def rewrite_card(folder: Path, results: Sequence[Path]) -> Path:
    """Write the card of a trained model anew, with results; returns its path.

    Args:
        folder: with the training.json of the run.
        results: results.md files of `cllm eval`.

    Raises:
        DataError: a file is missing or broken.
    """
    path = folder / FACTS_FILE
    try:
        facts = msgspec.json.decode(path.read_bytes(), type=TrainingFacts)
        texts = [result.read_text(encoding="utf-8") for result in results]
        (folder / CARD_FILE).write_text(model_card(facts, texts), encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{error}; name a folder written by `cllm sft` or `cllm train`, and results.md files"
        ) from error
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: {error}; train again, or restore the file") from error
    return folder / CARD_FILE


def model_card(facts: TrainingFacts, results: Sequence[str] = ()) -> str:
    """The README.md of the result, in Markdown with the Hub's metadata on top.

    Args:
        facts: of the run.
        results: of evaluations, each in Markdown.
    """
    rows = [
        ("base", facts.base),
        ("domain", facts.domain or "general"),
        ("Jacobi block length", facts.block_length or "none: trained for AR decoding"),
        ("data", facts.data),
        ("examples", f"{facts.num_examples} ({facts.num_left_out} longer ones left out)"),
        ("optimiser steps", facts.num_steps),
        ("packed tokens", facts.num_tokens),
        ("wall time", f"{facts.seconds / 60:.1f} min"),
        ("machine", facts.machine),
        *([("adapter multiplied afterwards by", facts.adapter_scale)] if facts.adapter_scale != 1 else []),
        *((name.replace("_", " ") + ", last report", value) for name, value in facts.final_losses.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    recipe = msgspec.json.format(msgspec.json.encode(facts.settings)).decode()
    return (
        f"---\nbase_model: {facts.base}\nlibrary_name: peft\ntags: [consistency-llm, jacobi-decoding]\n---\n\n"
        f"# {facts.title}\n\nTrained with cllm-server. Serve it with `cllm serve FOLDER`.\n\n"
        f"## Training\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"Settings:\n\n```json\n{recipe}\n```\n\n## Results\n\n{_nested(results)}\n"
    )


def _nested(results: Sequence[str]) -> str:
    """Results under the card's own heading: theirs go two levels down."""
    return (
        "\n".join(re.sub(r"^(#+ )", r"##\1", text.strip(), flags=re.MULTILINE) + "\n" for text in results)
        or _NO_RESULTS
    )
