"""Laws of a checkpoint's defaults: what its file names is taken where it makes sense, and nothing else."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.sampling_defaults import read_sampling_defaults
from cllm_core.request import SamplingDefaults
from tests.checkpoints import write_gguf
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.models.gguf.editing import edit_gguf


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


@pytest.fixture
def tiny_gguf(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama)


def read_gguf(base: Path, **stated: float) -> SamplingDefaults:
    """Of a file with these keys below general.sampling."""
    path = edit_gguf(
        base, base.with_name("edited.gguf"), {f"general.sampling.{key}": value for key, value in stated.items()}
    )
    return read_sampling_defaults(Checkpoint(path.parent, gguf_file=path.name))


def test_what_a_gguf_file_names_is_taken(tiny_gguf: Path) -> None:
    assert read_gguf(tiny_gguf) == SamplingDefaults()
    found = read_gguf(tiny_gguf, temp=0.6, top_k=20, top_p=0.95, min_p=0.05, penalty_repeat=1.1)
    assert found.values() == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }


def test_a_penalty_of_no_tokens_is_none(tiny_gguf: Path) -> None:
    assert read_gguf(tiny_gguf, penalty_repeat=1.1, penalty_last_n=0) == SamplingDefaults()
    assert read_gguf(tiny_gguf, penalty_repeat=1.1, penalty_last_n=64).values() == {"repetition_penalty": 1.1}


def test_sampling_of_a_gguf_file_that_is_not_applied_is_named(
    tiny_gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_gguf(tiny_gguf, temp=-1.0, mirostat=2).values() == {}
    assert "temp=-1.0" in caplog.text
    assert "general.sampling.mirostat: sampling of this kind is not applied" in caplog.text


def test_defaults_survive_an_export_to_gguf_and_back(
    export: Export,  # noqa: F811 - the fixture
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    stated = json.loads((source / "generation_config.json").read_text())
    expected = read(source, **stated, temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.05)
    path = export(source, tmp_path / "model.gguf", format="gguf")
    assert read_sampling_defaults(Checkpoint(path.parent, gguf_file=path.name)) == expected
    folder = export(path, tmp_path / "folder")
    assert read_sampling_defaults(Checkpoint(folder)) == expected
    assert json.loads((folder / "generation_config.json").read_text())["do_sample"] is True
