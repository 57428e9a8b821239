"""`cllm export` on the command line: what it writes, and one clear line for what cannot be."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cllm_core.config import EngineConfig
from cllm_core.models.cllm_json import CllmCard, write_card
from cllm_core.models.loader import load_model
from server.cli import app
from tests.checkpoints import build_model, write_adapter
from tests.conftest import CheckpointFactory
from tests.models.conftest import logits_of, plain_logits


def run(*words: object) -> tuple[int, str]:
    """Exit code and output of `cllm export`."""
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    return result.exit_code, result.output


def test_the_command_writes_a_folder_and_a_file_that_we_serve(tiny_llama: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "tiny.gguf"
    assert run(tiny_llama, folder)[0] == 0
    assert run(tiny_llama, file, "--format", "gguf", "--dtype", "f32")[0] == 0
    for output in (folder, file):
        config = EngineConfig(model=str(output), device="cpu", dtype="float32")
        loaded = load_model(config, lambda stage, fraction: None, attn_implementation="eager")
        assert torch.equal(logits_of(loaded.model), plain_logits(tiny_llama))


def test_an_output_that_exists_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    code, output = run(tiny_llama, tmp_path / "mine")
    assert code == 2
    assert "exists already" in output
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out", "--format", "gguf"], "ends in .gguf"),
        (["out.gguf"], "writes a folder"),
        (["out", "--dtype", "int8"], "int8"),
        (["out", "--format", "onnx"], "onnx"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, tiny_llama: Path, words: list[str], said: str) -> None:
    code, output = run(tiny_llama, tmp_path / words[0], *words[1:])
    assert code == 2
    assert said in " ".join(output.split())


def test_a_model_that_does_not_exist_is_named(tmp_path: Path) -> None:
    code, output = run(tmp_path / "nowhere", tmp_path / "out")
    assert (code, "nowhere" in output) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused(tmp_path: Path, tiny_checkpoint: CheckpointFactory) -> None:
    folder = tmp_path / "wide"
    model = build_model("llama")
    with torch.no_grad():
        next(model.parameters())[0, 0] = 1e6
    model.save_pretrained(folder)
    for path in tiny_checkpoint("llama").glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    code, output = run(folder, tmp_path / "out", "--dtype", "f16")
    assert (code, "beyond the range of float16" in " ".join(output.split())) == (2, True)


def test_a_place_that_cannot_be_written_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = run(tiny_llama, tmp_path / "file" / "out")
    assert (code, "cannot be written" in output) == (2, True)


def test_a_gated_adapter_is_not_merged(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "gated", tiny_llama, base=str(tiny_llama))
    write_card(adapter, CllmCard(format_version=1, gated=True))
    result = CliRunner().invoke(app, ["export", str(adapter), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is a gated adapter, which is not merged; export its base" in result.stderr
