"""cllm.json says what a checkpoint was trained for; a wrong one is refused, not half used."""

from pathlib import Path

import pytest

from cllm_core.errors import ConfigError, ModelLoadError
from cllm_core.models.cllm_json import CARD_FILE, CllmCard, read_card, write_card


def test_card_survives_writing_and_reading(tmp_path: Path) -> None:
    card = CllmCard(format_version=1, block_length=32, domain="text-to-sql", base="owner/base")
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card


def test_folder_without_a_card_has_none(tmp_path: Path) -> None:
    assert read_card(tmp_path) is None


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text('{"format_version": 1, "block_length": 8, "trained_by": "someone"}')
    assert read_card(tmp_path) == CllmCard(format_version=1, block_length=8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cllm.json"),
        ("{}", "format_version"),
        ('{"format_version": 2}', "format_version=2.*upgrade"),
        ('{"format_version": 1, "block_length": 0}', "block_length=0"),
        ('{"format_version": 1, "block_length": 257}', "block_length=257"),
        ('{"format_version": 1, "block_length": "16"}', "block_length"),
    ],
)
def test_wrong_card_is_refused_with_file_and_field(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / CARD_FILE).write_text(content)
    with pytest.raises(ModelLoadError, match=reason):
        read_card(tmp_path)


def test_wrong_card_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="block_length=0"):
        CllmCard(format_version=1, block_length=0)
