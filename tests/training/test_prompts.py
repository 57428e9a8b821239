"""Conversations from data, and their tokens."""

import json
from pathlib import Path

import pytest

from cllm_core.errors import ConfigError, DataError
from cllm_core.llm import LLM
from cllm_core.training.config import DataConfig
from cllm_core.training.encoding import ConversationEncoder
from cllm_core.training.prompts import Conversation, Message, load_conversations, require_answers
from cllm_core.training.self_written import opening_text
from tests.tasks.factories import write_spider
from tests.training.factories import write_lines


def load(path: Path, **options: object) -> list[Conversation]:
    return load_conversations(DataConfig(data=str(path), **options))  # type: ignore[arg-type]


def test_lines_with_prompt_and_answer_become_conversations(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi", "answer": "Hello"}, {"prompt": "Bye"}])
    assert load(path) == [Conversation((Message("user", "Hi"),), "Hello"), Conversation((Message("user", "Bye"),))]
    assert len(load(path, limit=1)) == 1


def test_messages_with_an_assistants_end_bring_their_answer(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    assert load(path) == [Conversation((Message("system", "S"), Message("user", "U")), "A")]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "1+1", "solution": "2"}])
    found = load(path, prompt_column="question", answer_column="solution")
    assert found == [Conversation((Message("user", "1+1"),), "2")]


def test_spider_gives_prompts_and_sql_and_renamed_copies(tmp_path: Path) -> None:
    data, tables = write_spider(tmp_path, questions=2)
    found = load(data, tables=tables, renamings=3)
    assert found[0].messages[0].content.endswith("\n\nHow many students, 0?")
    assert found[0].answer == "SELECT count(*) FROM Student"
    assert len(found) == 8


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "line 2: has neither 'prompt' nor 'messages' but text"),
        ({"prompt": ""}, "line 2: the prompt is empty"),
        ({"prompt": 5}, "line 2: 'prompt'"),
        ({"prompt": []}, "line 2: 'prompt': is an empty list"),
        ({"prompt": "x", "answer": 5}, "line 2: 'answer' is no text"),
        ({"messages": [{"role": "user"}]}, "line 2: 'messages': .*content"),
        ([1], "line 2: .*Expected `object`"),
    ],
)
def test_record_that_cannot_be_used_is_named_by_its_line(tmp_path: Path, record: object, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "good"}, record])
    with pytest.raises(DataError, match=message):
        load(path)


def test_missing_answers_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi", "answer": "Hello"}, {"prompt": "Bye"}])
    config = DataConfig(data=str(path))
    with pytest.raises(DataError, match=r"record 2 has no answer in 'answer'"):
        require_answers(load_conversations(config), config)


def test_renamings_without_schemas_are_refused() -> None:
    with pytest.raises(ConfigError, match="renamings=2: needs the schemas"):
        DataConfig(data="a.jsonl", renamings=2)


def test_encoded_prompt_is_what_the_server_decodes(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), device="cpu")
    encoder = ConversationEncoder(llm.info.tokenizer, llm.info.eos_token_ids)
    ours = encoder.encode_prompt(Conversation((Message("user", "the token"),)))
    theirs = llm.chat([{"role": "user", "content": "the token"}], progress=False)[0].prompt_ids
    assert ours == theirs
    assert encoder.encode_answer("the token")[-1] in llm.info.eos_token_ids
    assert encoder.codec.decode(encoder.encode_answer("the token")) == "the token"


def test_opening_of_the_users_turn_is_what_comes_before_the_message(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), device="cpu")
    encoder = ConversationEncoder(llm.info.tokenizer, llm.info.eos_token_ids)
    assert opening_text(encoder) == "<|im_start|>user\n"


def test_models_without_template_take_plain_prompts(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), device="cpu")
    bundle = llm.info.tokenizer
    plain = type(bundle)(tokenizer_json=bundle.tokenizer_json)
    encoder = ConversationEncoder(plain, llm.info.eos_token_ids)
    assert encoder.prompt_text(Conversation((Message("user", "x"),))) == "x"
    with pytest.raises(DataError, match="no chat template"):
        encoder.prompt_text(Conversation((Message("system", "s"), Message("user", "x"))))
    with pytest.raises(ConfigError, match="self_written"):
        opening_text(encoder)


def test_json_dump_of_a_conversation_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "é\n"}]}) + "\n", encoding="utf-8")
    assert load(path)[0].messages[0].content == "é\n"
