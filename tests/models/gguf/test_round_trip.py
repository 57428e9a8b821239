"""A GGUF file computes what the folder computes that it was written from, for every architecture that is read."""

from pathlib import Path

import pytest
import torch

from cllm_core.models.gguf.architectures import ARCHITECTURES, architecture_written_as
from cllm_core.models.proven import read_proven
from tests.checkpoints import VOCAB_SIZE
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import CONFIGS, write_model
from tests.models.conftest import Load

MAX_DIFFERENCE = 1e-3  # nats
LENGTHS = (5, 33, 90, 300)


def random_tokens(length: int) -> torch.Tensor:
    """[1, length] int64, always the same for a length."""
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, length: int) -> torch.Tensor:
    """[1, length, V] of `random_tokens`."""
    return torch.log_softmax(model(random_tokens(length)).logits, dim=-1)


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
