"""No setting is missed: unknown names, empty key lists and doubled keys end the start, in one line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cllm_core.errors import ConfigError
from server.cli import app
from server.cli.config_file import read_config_file
from server.cli.names import require_known_variables
from server.cli.options import load_settings
from server.engine_settings import EngineSettings
from server.settings import ServerSettings


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("CLLM_MAX_NUM_SEQ", "did you mean CLLM_MAX_NUM_SEQS?"),
        ("CLLM_PROT", "did you mean CLLM_PORT?"),
        ("CLLM_QQQQQQQQ", "`cllm serve --help` lists them"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(variable: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"{variable}: there is no such setting; .*") as refused:
        require_known_variables({variable: "1"})
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    "variable",
    [
        *("CLLM_PORT", "CLLM_API_KEY", "CLLM_MIN_REPLICAS", "CLLM_CACHE_DIR", "CLLM_CONFIG", "PATH"),
        *("CLLM_SERVICE_HOST", "CLLM_SERVICE_PORT_HTTP", "CLLM_PORT_8000_TCP", "CLLM_PORT_8000_TCP_ADDR"),
        "CLLM_SERVER_SERVICE_PORT",
    ],
)
def test_variables_of_other_commands_and_of_the_surroundings_are_known(variable: str) -> None:
    require_known_variables({variable: "1"})


def test_both_spellings_of_the_key_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_API_KEY", "secret")
    monkeypatch.setenv("CLLM_ADMIN_KEY", "root")
    settings = load_settings(ServerSettings, {})
    assert (settings.api_keys, settings.admin_keys) == (("secret",), ("root",))
    monkeypatch.setenv("CLLM_API_KEYS", "other")
    result = run_serve()
    assert "error: CLLM_API_KEYS and CLLM_API_KEY mean the same setting; unset one of them" in result


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_a_key_variable_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CLLM_API_KEYS", value)
    assert "error: CLLM_API_KEYS: is set, but names no key; give one, or unset it" in run_serve()


@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
def test_an_empty_key_is_refused(flag: str) -> None:
    assert "is given, but names no key; give one, or leave it out" in run_serve(flag, "")


def run_serve(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    return result.stderr


def written(folder: Path, text: str) -> Path:
    path = folder / "cllm.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_stands_beneath_environment_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, 'port = 1\nhost = "::1"\nmax-num-seqs = 3\nplayground = false\napi-key = "one"\n')
    monkeypatch.setenv("CLLM_HOST", "127.0.0.2")
    monkeypatch.setenv("CLLM_PORT", "2")
    settings = load_settings(ServerSettings, {"port": "3"}, path)
    assert (settings.port, settings.host, settings.max_num_seqs) == (3, "127.0.0.2", 3)
    assert (settings.playground, settings.api_keys) == (False, ("one",))


def test_a_file_of_the_server_serves_other_commands_too(tmp_path: Path) -> None:
    path = written(tmp_path, 'port = 9000\nadapters = ["sql=./a", "chat=./b"]\nmin_replicas = 2\n')
    settings = load_settings(EngineSettings, {}, path)
    assert settings.to_engine_config().adapters == {"sql": "./a", "chat": "./b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq = 3", "max_num_seq: there is no such setting; did you mean max_num_seqs?"),
        ("api_key = 'a'\napi_keys = 'b'", "api_keys: is given twice"),
        ("[server]\nport = 1", "server: there is no such setting"),
        ("[port]\nx = 1", r"\[port\]: must be a value, not a table"),
        ("port = ", "invalid TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config_file(written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert f"config={tmp_path / 'none.toml'}: cannot be read" in run_serve("--config", str(tmp_path / "none.toml"))


def test_a_wrong_value_in_a_file_is_refused_by_the_names_of_its_option(tmp_path: Path) -> None:
    assert "--port (CLLM_PORT) = 99999" in run_serve("--config", str(written(tmp_path, "port = 99999")))
