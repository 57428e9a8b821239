"""A GGUF file computes what the folder computes that it was written from, for every architecture that is read."""

from pathlib import Path

import pytest

from cllm_core.models.gguf.architectures import ARCHITECTURES, architecture_written_as
from cllm_core.models.proven import read_proven
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import CONFIGS, log_probabilities, write_model
from tests.gguf_page import BEGIN, END, HEAD, PAGE
from tests.models.conftest import Load

MAX_DIFFERENCE = 1e-3  # nats
LENGTHS = (5, 33, 90, 300)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_computes_what_its_folder_computes(
    export: Export,  # noqa: F811 - the fixture
    load: Load,
    tmp_path: Path,
    name: str,
) -> None:
    folder = write_model(tmp_path / "folder", name)
    path = export(folder, tmp_path / "model.gguf", format="gguf")
    expected, loaded = load(folder), load(path)
    for length in LENGTHS:
        difference = log_probabilities(loaded.model, length) - log_probabilities(expected.model, length)
        assert difference.abs().max() < MAX_DIFFERENCE
    assert (loaded.eos_token_ids, loaded.max_model_len) == (expected.eos_token_ids, expected.max_model_len)


def test_every_architecture_is_among_the_models() -> None:
    assert {architecture_written_as(config) for config in CONFIGS.values()} == set(ARCHITECTURES.values())


def test_the_list_of_what_is_proven_names_every_architecture() -> None:
    assert read_proven().gguf == sorted(kind.config_class.model_type for kind in ARCHITECTURES.values())


def test_the_table_of_the_comparison_with_llama_cpp_has_every_model() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    named = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][len(HEAD) :]
    assert named == list(CONFIGS), "run `make gguf`"
