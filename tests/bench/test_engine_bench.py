from pathlib import Path

import msgspec
from typer.testing import CliRunner

from cllm_core.bench.engine import as_markdown, bench_engine
from cllm_core.config import EngineConfig
from server.cli import app
from tests.checkpoints import write_checkpoint


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
