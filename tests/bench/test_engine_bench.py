import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from cllm_core.bench.engine import _load, as_markdown, bench_engine
from cllm_core.config import EngineConfig
from cllm_core.engine.engine import Engine
from cllm_core.models.progress import OnProgress
from cllm_core.request import NewRequest
from server.cli import app
from tests.checkpoints import IM_START_ID, write_checkpoint


def test_every_way_to_decode_is_measured_and_explained(tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_checkpoint(tmp_path, "llama")), num_cache_blocks=64)
    bench = bench_engine(config, ["one two", "three"], block_lengths=[4, 8], max_tokens=6, num_rounds=2)
    assert [way.name for way in bench.decoding] == ["transformers.generate", "AR", "Jacobi, n = 4", "Jacobi, n = 8"]
    ar = bench.decoding[1]
    assert ar.tokens_per_forward == 1
    assert ar.milliseconds is not None
    assert all(value > 0 for value in ar.milliseconds.values())
    assert all(way.tokens_per_second > 0 for way in bench.decoding)
    assert all(step.forward > 0 and step.linear_layers > 0 for step in bench.steps)
    page = as_markdown(bench, machine="a machine", commit="abc")
    assert all(way.name in page for way in bench.decoding)


def test_the_command_writes_its_results_to_files(tmp_path: Path) -> None:
    model, output, prompts = write_checkpoint(tmp_path / "model", "qwen2"), tmp_path / "out", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two three"}\n')
    command = ["bench", "engine", str(model), "--num-cache-blocks", "64", "--max-tokens", "3", "--rounds", "1"]
    result = CliRunner().invoke(app, [*command, "--prompts", str(prompts), "--output", str(output)])
    assert result.exit_code == 0, result.output
    record = msgspec.json.decode((output / "engine.json").read_bytes())
    assert record["bench"]["num_prompts"] == 1
    assert (output / "engine.md").read_text() in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "missing.jsonl"], "--prompts missing.jsonl: cannot be read"),
        (["--prompts", os.devnull], f"--prompts {os.devnull}: holds no record"),
        (["--output", f"{os.devnull}/out"], f"--output {os.devnull}/out: cannot be made"),
    ],
)
def test_the_command_says_what_is_wrong_before_it_measures(words: list[str], message: str) -> None:
    """A folder that could not be made was found out at the end, and the options named were those of `generate`."""
    done = CliRunner().invoke(app, ["bench", "engine", "nowhere/", *words])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(("device", "last"), [("cuda", "engine"), ("cpu", "reference")])
def test_on_a_gpu_the_cache_takes_what_the_reference_leaves(
    monkeypatch: pytest.MonkeyPatch, device: str, last: str
) -> None:
    """The KV cache took nearly all memory, so that a large model did not find room for its second copy."""
    made: list[str] = []
    loaded = SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))

    def load(config: EngineConfig, on_progress: OnProgress, attn_implementation: str = "") -> SimpleNamespace:
        made.append("reference" if attn_implementation else "model")
        return loaded

    monkeypatch.setattr("cllm_core.bench.engine.load_model", load)
    monkeypatch.setattr("cllm_core.bench.engine.assemble_engine", lambda *given: made.append("engine"))
    _load(EngineConfig())
    assert made[0] == "model"
    assert made[-1] == last
    assert len(made) == 3


def test_prompts_can_be_messages_to_be_answered(tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_checkpoint(tmp_path, "llama")), num_cache_blocks=64)
    seen: list[tuple[int, ...]] = []
    add_request = Engine.add_request

    def note(engine: Engine, request: NewRequest) -> None:
        seen.append(request.prompt_ids)
        add_request(engine, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "add_request", note)
        bench_engine(config, ["one"], chat=True, block_lengths=[4], max_tokens=2, num_rounds=1)
    assert {ids[0] for ids in seen} == {IM_START_ID}
