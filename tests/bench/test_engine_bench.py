import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from cllm_core.bench.engine import StepSeconds, _load, _run_engine, as_markdown, bench_engine
from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.engine.engine import Engine
from cllm_core.engine.step_times import StepTimes
from cllm_core.errors import ConfigError
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
    assert f"| {bench.products}, ms |" in page


def test_the_step_measured_is_the_engines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step was spelled out a second time without what follows the commit, so that draft lengths learnt no times."""
    engine = build_engine(EngineConfig(model=str(write_checkpoint(tmp_path, "llama")), num_cache_blocks=64))
    model, own = engine.runner.model, [set(vars(part)) for part in (engine, engine.scheduler, engine.runner)]
    observed: list[int] = []
    monkeypatch.setattr(StepTimes, "observe", lambda times, num_tokens, seconds: observed.append(num_tokens))
    run = _run_engine(engine, (5, 6, 7), block_length=4, max_tokens=6)
    assert len(observed) == run.num_steps == engine.stats().num_steps > 0
    assert run.parts is not None
    assert sum(getattr(run.parts, part) for part in StepSeconds.__struct_fields__) <= run.seconds
    assert engine.runner.model is model
    assert [set(vars(part)) for part in (engine, engine.scheduler, engine.runner)] == own


def test_passes_that_only_read_the_prompt_yield_no_tokens(tmp_path: Path) -> None:
    """They counted as forward passes, so that AR seemed to accept less than a token in one."""
    config = EngineConfig(
        model=str(write_checkpoint(tmp_path, "llama")), num_cache_blocks=64, max_num_seqs=4, max_batched_tokens=4
    )
    run = _run_engine(build_engine(config), tuple(range(5, 17)), block_length=1, max_tokens=3)
    assert run.num_tokens == run.num_forward_passes == 3
    assert run.num_steps == 3 + 2


@pytest.mark.parametrize(("block_size", "needed"), [(16, 18), (32, 9)])
def test_a_cache_too_small_for_the_timed_steps_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int, needed: int
) -> None:
    """Kernels wrote behind its end."""
    monkeypatch.setattr("cllm_core.bench.engine._run_engine", lambda *args, **settings: pytest.fail("measured"))
    monkeypatch.setattr("cllm_core.bench.engine._run_transformers", lambda *args, **settings: pytest.fail("measured"))
    config = EngineConfig(
        model=str(write_checkpoint(tmp_path, "llama")), num_cache_blocks=needed - 1, cache_block_size=block_size
    )
    with pytest.raises(ConfigError, match=f"num_cache_blocks={needed - 1}: .* at least {needed} blocks"):
        bench_engine(config, ["one"], block_lengths=[4], max_tokens=2, num_rounds=1)


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

    def load(
        config: EngineConfig, on_progress: OnProgress, attn_implementation: str = "", **_: object
    ) -> SimpleNamespace:
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
