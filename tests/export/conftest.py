"""What the tests of exporting share: an export without progress, and a trained adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_core.export.config import ExportConfig
from cllm_core.export.run import export_model
from cllm_core.models.cllm_json import CllmCard, write_card
from tests.checkpoints import write_adapter
from tests.models.conftest import load  # noqa: F401 - a fixture here, too

Export = Callable[..., Path]


@pytest.fixture
def export() -> Export:
    """Export with the given settings."""

    def export_silently(model: Path | str, output: Path, **settings: object) -> Path:
        config = ExportConfig(model=str(model), output=output, **settings)  # type: ignore[arg-type]
        return export_model(config, lambda stage, fraction: None)

    return export_silently


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    """A Consistency LLM as an adapter on the tiny Llama, with cllm.json and a model card."""
    folder = write_adapter(tmp_path / "adapter", tiny_llama)
    write_card(folder, CllmCard(format_version=1, block_length=8, domain="sql"))
    (folder / "README.md").write_text("---\nbase_model: x\n---\n\n# Its own card\n\nIt was trained.\n")
    return folder
