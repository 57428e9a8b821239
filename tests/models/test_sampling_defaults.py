"""Laws of a checkpoint's defaults: what its file names is taken where it makes sense, and nothing else."""

import json
import logging
from pathlib import Path

import pytest

from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.sampling_defaults import read_sampling_defaults
from cllm_core.request import SamplingDefaults


def read(folder: Path, **stated: object) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(stated))
    return read_sampling_defaults(Checkpoint(folder))


def test_what_the_file_names_is_taken(tmp_path: Path) -> None:
    named = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    found = read(tmp_path, **named, max_new_tokens=512, do_sample=False, eos_token_id=2)
    assert found.values() == {**named, "max_tokens": 512}


def test_what_it_does_not_name_has_no_default(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=2) == SamplingDefaults()
    assert read(tmp_path, temperature=None) == SamplingDefaults()
    assert read_sampling_defaults(Checkpoint(tmp_path / "empty")) == SamplingDefaults()
    assert read_sampling_defaults(Checkpoint(tmp_path, gguf_file="model.gguf")) == SamplingDefaults()


@pytest.mark.parametrize(
    "stated",
    [{"top_p": 0}, {"top_p": 2}, {"temperature": "hot"}, {"top_k": 2.5}, {"min_p": True}, {"repetition_penalty": -1}],
)
def test_values_that_make_no_sense_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stated: dict[str, object]
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, **{"temperature": 0.5, **stated}).values() in ({"temperature": 0.5}, {})
    (name,) = stated
    assert name in caplog.text


def test_top_k_of_minus_one_is_off(tmp_path: Path) -> None:
    assert read(tmp_path, top_k=-1).top_k == 0


def test_a_file_that_cannot_be_read_sets_nothing(tmp_path: Path) -> None:
    for text in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(text)
        assert read_sampling_defaults(Checkpoint(tmp_path)) == SamplingDefaults()
