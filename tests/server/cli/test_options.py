"""Settings are defined once: flags, environment and engine agree, and bad values end in one clear line."""

import inspect

import msgspec
import pytest
from typer.testing import CliRunner

from cllm_core.config import EngineConfig
from server.cli import app
from server.cli.options import load_settings
from server.engine_settings import EngineSettings
from server.settings import ServerSettings

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"CLLM_{name}".upper(), raising=False)


def test_the_engines_settings_are_those_of_its_config() -> None:
    # `adapters` speaks for both of the config's fields.
    assert {*EngineSettings.model_fields, "adapter"} == set(EngineConfig.__struct_fields__)
    assert EngineSettings().to_engine_config() == EngineConfig()


def test_every_engine_setting_reaches_the_worker() -> None:
    given = {"model": "x", "dtype": "float32", "block_length": 8, "prefix_caching": False, "cache_memory_gib": 0.5}
    config = EngineSettings.model_validate(given).to_engine_config()
    assert {name: value for name, value in msgspec.structs.asdict(config).items() if name in given} == given


def test_adapters_with_a_name_are_served_and_one_without_is_merged() -> None:
    named = load_settings(ServerSettings, {"adapters": ["sql=./a=b", "chat=owner/name"]}).to_engine_config()
    assert (named.adapter, named.adapters) == (None, {"sql": "./a=b", "chat": "owner/name"})
    merged = load_settings(ServerSettings, {"adapters": ["./a"]}).to_engine_config()
    assert (merged.adapter, merged.adapters) == ("./a", {})


@pytest.mark.parametrize("command", [["bench", "engine"], ["eval", "--task", "chat", "--data", "questions.jsonl"]])
def test_commands_that_run_one_model_refuse_adapters_beside_it(command: list[str]) -> None:
    result = run(app, [*command, "--adapter", "sql=./lora"])
    assert result.exit_code == 2
    assert "adapters=sql=./lora: this command runs one model; leave out sql= to merge it" in result.stderr


def test_the_environment_fills_in_what_flags_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_PORT", "9000")
    monkeypatch.setenv("CLLM_API_KEYS", "one, two")
    monkeypatch.setenv("CLLM_BLOCK_LENGTH", "")
    settings = load_settings(ServerSettings, {"host": "0.0.0.0", "port": None})
    assert (settings.host, settings.port, settings.api_keys) == ("0.0.0.0", 9000, ("one", "two"))
    assert settings.block_length is None
    assert settings.to_engine_config().drafters == ("own", "copy")
    assert load_settings(ServerSettings, {"port": "9001"}).port == 9001


def test_keys_stay_out_of_what_is_printed() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port (CLLM_PORT) = '99999'"),
        (["--dtype", "int3"], "--dtype (CLLM_DTYPE) = 'int3'"),
        (["--max-num-seqs", "0"], "max_num_seqs=0: must be in 1..4096"),
        (["--max-num-seqs", "64", "--max-batched-tokens", "8"], "max_batched_tokens=8"),
        (["--stream-interval", "-0.1"], "stream_interval=-0.1"),
        (["--stream-interval", "nan"], "stream_interval=nan"),
        (["--worker", "nonsense"], "endpoint='nonsense'"),
        (["--adapter", "a", "--adapter", "b"], "adapters=a, b: only one can be merged"),
        (["--adapter", "a=x", "--adapter", "a=y"], "adapters: the name 'a' is given twice (x, y)"),
        (["--adapter", "sql="], "adapters=sql=: names no adapter"),
        (["--adapter", "a b=x"], "adapter name 'a b': must be"),
        (["--adapter", "sql=x", "--adapter", "y"], "adapter='y': cannot be merged where adapters (sql) are served"),
        (["--adapter", "sql=x", "--max-adapters", "0"], "max_adapters=0: must be >= 1; 1 are named in adapters"),
        (["--adapter", "sql=x", "--served-model-name", "sql"], "served_model_names='sql': is the name of an adapter"),
    ],
)
def test_a_bad_setting_ends_with_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "worker", "generate", "chat"])
def test_help_shows_the_settings_in_panels(command: str) -> None:
    result = run(app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0
    for word in ("Model", "Decoding", "Memory", "--block-length", "CLLM_BLOCK_LENGTH"):
        assert word in result.output


def test_commands_take_all_settings_as_options() -> None:
    serve = next(command for command in app.registered_commands if command.callback.__name__ == "serve")  # type: ignore[union-attr]
    parameters = list(inspect.signature(serve.callback).parameters)  # type: ignore[arg-type]
    assert parameters == [*ServerSettings.model_fields, "config"]
