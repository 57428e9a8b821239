"""Settings of the comparison: what is refused, and which servers they come to."""

from pathlib import Path

import pytest

from benchmarks.served.__main__ import plan_of
from benchmarks.served.config import ServedConfig
from benchmarks.served.prompts import PromptSupply, read_prompts, spider_prompts
from benchmarks.served.servers import AR, JACOBI, LLAMA
from cllm_core.errors import ConfigError, DataError

QUESTIONS = '[{"db_id": "shop", "question": "How many?", "query": "SELECT count(*) FROM item"}]'
SCHEMAS = """[{"db_id": "shop", "table_names_original": ["item"], "column_names_original": [[-1, "*"], [0, "name"]],
               "column_types": ["text", "text"]}]"""


def make_config(**values: object) -> ServedConfig:
    """A comparison of this server's two ways."""
    return ServedConfig(**{"model": "some/model", "output": Path("out"), **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"concurrency": "1,many"}, "1,many"),
        ({"concurrency": "0,1"}, "0,1"),
        ({"concurrency": ""}, "nothing to compare"),
        ({"ar": False, "jacobi": False}, "nothing to compare"),
        ({"urls": "http://127.0.0.1:1"}, "NAME=BASE_URL"),
        ({"gguf": Path("x.gguf")}, "llama_server and gguf"),
        ({"llama_variants": "ngram"}, "NAME=FLAGS"),
        ({"spider": Path("dev.json")}, "spider and tables"),
        ({"llama_server": Path("nowhere"), "gguf": Path("nowhere.gguf")}, "no such file"),
        ({"transformers": Path("transformers")}, "needs a folder"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config(**values)


def test_servers_take_turns_in_the_order_of_the_settings(tmp_path: Path) -> None:
    program, model = tmp_path / "llama-server", tmp_path / "m.gguf"
    program.touch()
    model.touch()
    plan = plan_of(make_config(llama_server=program, gguf=model, urls="other=http://127.0.0.1:1/v1", block_length=8))
    assert [spec.name for spec in plan.servers] == [AR, JACOBI, LLAMA, "other"]
    assert "--block-length=1" in plan.servers[0].command
    assert "--block-length=8" in plan.servers[1].command
    command = plan.servers[2].command
    assert command[command.index("--parallel") + 1] == "32"
    assert command[command.index("--ctx-size") + 1] == str(32 * 2048)
    assert plan.engine is not None
    assert plan.engine.block_length == 8


def test_llama_server_is_measured_with_its_drafts_too(tmp_path: Path) -> None:
    program, model = tmp_path / "llama-server", tmp_path / "m.gguf"
    program.touch()
    model.touch()
    variants = "ngram=--spec-type ngram-mod; draft=--spec-type draft-simple --model-draft d.gguf"
    plan = plan_of(make_config(llama_server=program, gguf=model, llama_variants=variants, llama_args="--mlock"))
    assert [spec.name for spec in plan.servers[2:]] == [LLAMA, "llama-server, ngram", "llama-server, draft"]
    assert plan.servers[2].command[-1] == "--mlock"
    assert plan.servers[4].command[-5:] == ("--mlock", "--spec-type", "draft-simple", "--model-draft", "d.gguf")


def test_a_program_in_this_folder_is_not_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = Path("transformers")
    program.touch()
    spec = plan_of(make_config(model=str(tmp_path), transformers=program)).servers[-1]
    assert spec.command[0] == spec.version_command[0] == str(tmp_path / "transformers")


def test_the_engine_alone_needs_a_load_of_one() -> None:
    assert plan_of(make_config(concurrency="2,4")).engine is None


def test_spider_questions_come_with_their_schemas(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(QUESTIONS)
    (tmp_path / "tables.json").write_text(SCHEMAS)
    assert spider_prompts(tmp_path / "dev.json", tmp_path / "tables.json") == ["item(name)\n\nHow many?"]


def test_a_broken_prompt_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_prompts_repeat_only_when_all_are_used() -> None:
    supply = PromptSupply(["a", "b", "c"])
    assert (supply.take(2), supply.repeats) == (["a", "b"], False)
    assert (supply.take(2), supply.repeats) == (["c", "a"], True)
