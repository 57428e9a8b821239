"""An interrupted run goes on where it stopped, and never mixes with another."""

import os
from pathlib import Path

import pytest

from cllm_core.errors import ConfigError, DataError
from cllm_core.evaluation.records import ANSWERS_FILE, AnswerStore, fingerprint, fingerprint_model
from tests.evaluation.factories import make_answer

SETTINGS = {"task": "chat", "seed": 0}


def test_answers_survive_and_the_last_of_a_key_wins(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "new", SETTINGS)
    store.add(make_answer())
    store.add(make_answer(num_tokens=5))
    store.add(make_answer(example="1"))
    again = AnswerStore(tmp_path / "new", SETTINGS)
    assert again.answers == store.answers
    assert [answer.num_tokens for answer in again.answers.values()] == [5, 10]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    AnswerStore(tmp_path, SETTINGS).add(make_answer())
    with (tmp_path / ANSWERS_FILE).open("ab") as file:
        file.write(b'{"model": "mo')
    store = AnswerStore(tmp_path, SETTINGS)
    store.add(make_answer(example="1"))
    assert len(AnswerStore(tmp_path, SETTINGS).answers) == 2


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    AnswerStore(tmp_path, SETTINGS)
    (tmp_path / ANSWERS_FILE).write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"answers\.jsonl, line 1"):
        AnswerStore(tmp_path, SETTINGS)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    AnswerStore(tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match="holds a run with seed=0, this one has seed=1"):
        AnswerStore(tmp_path, {**SETTINGS, "seed": 1})


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output .*cannot be written"):
        AnswerStore(tmp_path / "file", SETTINGS)


def test_a_fingerprint_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("a")
    before = fingerprint(path)
    path.write_text("b")
    assert fingerprint(path) != before


@pytest.mark.parametrize("name", ["tiny.gguf", "model-00001-of-00002.safetensors", "tokenizer.json", "cllm.json"])
def test_what_a_model_is_read_from_changes_its_fingerprint(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("a")
    before = fingerprint_model(path), fingerprint_model(tmp_path)
    path.write_text("b")
    os.utime(path, (1, 1))  # a clock may be too coarse to tell the two apart
    assert fingerprint_model(path) != before[0]
    assert fingerprint_model(tmp_path) != before[1]


def test_what_lies_beside_a_model_does_not_change_its_fingerprint(tmp_path: Path) -> None:
    """A model card written anew and deleted checkpoints were taken for another model."""
    (tmp_path / "adapter_model.safetensors").write_text("a")
    before = fingerprint_model(tmp_path)
    (tmp_path / "README.md").write_text("results")
    (tmp_path / "checkpoints").mkdir()
    assert fingerprint_model(tmp_path) == before
