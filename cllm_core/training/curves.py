"""The loss curve of a run as JSON lines and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cllm_core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSONL_FILE = "losses.jsonl"
PICTURE_FILE = "losses.png"
_LOSSES = ("loss", "ar_loss", "consistency_loss")

Entry = Mapping[str, float]


def write_curves(folder: Path, history: Sequence[Entry]) -> None:
    """Write the reports of a run so far, one JSON object a line; a resumed run rewrites what it repeats."""
    lines = [msgspec.json.encode(dict(entry)) for entry in history]
    (folder / JSONL_FILE).write_bytes(b"".join(line + b"\n" for line in lines))


def draw_curves(folder: Path, history: Sequence[Entry]) -> None:
    """Draw losses and learning rate over the optimiser steps to losses.png."""
    figure_class = _figure_class()
    entries = [entry for entry in history if "loss" in entry]
    if not entries:
        return
    figure = figure_class(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in entries]
    for name in _LOSSES:
        values = [entry.get(name, 0.0) for entry in entries]
        if any(values):
            axes.plot(steps, values, label=name.replace("_", " "))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [entry["learning_rate"] for entry in entries], color="gray", alpha=0.4, linestyle="--")
    rate.set_ylabel("learning rate (dashed)")
    axes.legend()
    figure.savefig(folder / PICTURE_FILE, dpi=120)


def require_plotting() -> None:
    """Raise ConfigError, before a run starts, unless curves can be drawn."""
    _figure_class()


def _figure_class() -> type["Figure"]:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - needed for training alone
    except ImportError as error:
        raise ConfigError(
            "training draws its curves with matplotlib: run `pip install 'cllm-server[train]'`"
        ) from error
    return Figure
