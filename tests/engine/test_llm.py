"""LLM: adapters by name, each with the chat template it brings; outputs that match a grammar."""

import json
import shutil
from pathlib import Path

import pytest

from cllm_core import LLM, SamplingParams
from cllm_core.errors import ConfigError, InvalidRequest
from cllm_core.text.grammar import choice_grammar
from tests.checkpoints import write_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=12)
TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def llm(tiny_llama: Path, tmp_path: Path) -> LLM:
    sql = write_adapter(tmp_path / "sql", tiny_llama)
    (sql / "chat_template.jinja").write_text(TEMPLATE)
    chat = write_adapter(tmp_path / "chat", tiny_llama, seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, chat)
    adapters = {"sql": str(sql), "chat": str(chat)}
    return LLM(str(tiny_llama), adapters=adapters, dtype="float32", device="cpu", num_cache_blocks=16)


def test_adapters_answer_differently_and_by_their_own_template(llm: LLM) -> None:
    texts = [llm.generate("The answer", GREEDY, adapter=name, progress=False)[0].text for name in ("", "sql", "chat")]
    assert len(set(texts)) == 3
    asked = [{"role": "user", "content": "The answer"}]
    results = {name: llm.chat(asked, GREEDY, adapter=name, progress=False)[0] for name in ("", "sql", "chat")}
    assert len(results["sql"].prompt_ids) < len(results[""].prompt_ids)
    assert results["chat"].prompt_ids == results[""].prompt_ids  # a copy of the base's tokenizer, without a template
    assert llm.info.adapters[1].tokenizer is None
    streamed = "".join(delta.text for delta, _ in llm.stream_chat(asked, GREEDY, adapter="sql"))
    assert streamed == results["sql"].text


def test_an_unknown_adapter_is_refused_with_the_names_there_are(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="adapter='sq1': is not loaded; loaded are: sql, chat"):
        llm.generate("The answer", GREEDY, adapter="sq1", progress=False)


def test_each_prompt_may_have_sampling_parameters_of_its_own(llm: LLM) -> None:
    """A list of them ended in an AttributeError."""
    own = [GREEDY, SamplingParams(temperature=0, max_tokens=3), SamplingParams(seed=5, max_tokens=7)]
    prompts = ["The answer", "the token", "The answer"]
    together = llm.generate(prompts, own, n=2, progress=False)
    alone = [llm.generate(prompt, params, n=2, progress=False)[0] for prompt, params in zip(prompts, own, strict=True)]
    assert [[o.token_ids for o in result.outputs] for result in together] == [
        [o.token_ids for o in result.outputs] for result in alone
    ]
    assert len(together[1].outputs[0].token_ids) == 3
    asked = [[{"role": "user", "content": text}] for text in prompts]
    answers = llm.chat(asked, own, progress=False)
    expected = [llm.chat(one, params, progress=False)[0] for one, params in zip(asked, own, strict=True)]
    assert [answer.outputs[0].token_ids for answer in answers] == [one.outputs[0].token_ids for one in expected]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([GREEDY], "1 params for 2 prompts: pass one for all or one for each"),
        ({"temperature": 0}, "must be SamplingParams, or a list with one for each prompt"),
        ([GREEDY, 0.5], "must be SamplingParams, or a list with one for each prompt"),
    ],
)
def test_parameters_of_another_type_or_number_are_refused(llm: LLM, params: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(["a", "b"], params, progress=False)  # type: ignore[arg-type]


def test_outputs_of_base_and_adapters_match_their_grammar(llm: LLM) -> None:
    params = SamplingParams(temperature=0, grammar=choice_grammar(["the server", "the client"]))
    results = [llm.generate(["a", "b"], params, adapter=name, progress=False) for name in ("", "sql")]
    assert {one.text for result in results for one in result} <= {"the server", "the client"}


def test_an_output_that_cannot_go_on_ends_alone_and_leaves_the_engine_idle(llm: LLM) -> None:
    """It used to raise, and the outputs of all other prompts were lost."""
    dead_end = SamplingParams(temperature=0, grammar='start: "ab" DEAD\nDEAD: /[b-y]+z/ & /[c-z]+y/')
    plain = SamplingParams(temperature=0, max_tokens=5)
    broken, whole = llm.generate(["The answer", "The answer"], [dead_end, plain], progress=False)
    assert broken.outputs[0].finish_reason == "error"
    assert "grammar" in (broken.outputs[0].error or "")
    assert whole == llm.generate("The answer", plain, progress=False)[0]
    assert not llm.engine.has_work()
    with pytest.raises(InvalidRequest, match="unknown name"):
        llm.generate("The answer", SamplingParams(grammar="start: missing"), progress=False)


def load(folder: Path, **settings: object) -> LLM:
    return LLM(str(folder), dtype="float32", device="cpu", num_cache_blocks=16, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tail", "reasoning_format", "is_reasoning"),
    [("<think>\n", "auto", True), ("<think></think>", "auto", False), ("<think>\n", "none", False)],
)
def test_reasoning_is_told_from_the_answer_and_comes_before_what_a_grammar_binds(
    tiny_llama: Path, tmp_path: Path, tail: str, reasoning_format: str, is_reasoning: bool
) -> None:
    (tmp_path / "think.jinja").write_text(f"{TEMPLATE}{{{{ {tail!r} }}}}")
    llm = load(tiny_llama, chat_template=str(tmp_path / "think.jinja"), reasoning_format=reasoning_format)
    grammar = choice_grammar(["the server", "the client"])
    asked = [{"role": "user", "content": "The answer"}]
    params = SamplingParams(temperature=0, max_tokens=12, grammar=grammar)
    output = llm.chat(asked, params, progress=False)[0].outputs[0]
    # Weights that are random think on without end.
    assert bool(output.reasoning) == (output.finish_reason == "length") == is_reasoning
    assert output.text in ("the server", "the client") or is_reasoning
    streamed = [delta for delta, _ in llm.stream_chat(asked, params)]
    assert "".join(delta.reasoning for delta in streamed) == output.reasoning
    assert "".join(delta.text for delta in streamed) == output.text


def test_an_unknown_reasoning_format_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="reasoning_format='thoughts': must be one of auto, none, think"):
        load(tiny_llama, reasoning_format="thoughts")


def test_the_checkpoint_sets_parameters_where_none_are_given(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    stated = {"temperature": 0.0, "top_k": 5, "max_new_tokens": 4}
    (folder / "generation_config.json").write_text(json.dumps(config | stated))
    llm = load(folder)
    assert llm.default_params == SamplingParams(temperature=0.0, top_k=5, max_tokens=4)
    assert len(llm.generate("The answer", progress=False)[0].outputs[0].token_ids) == 4
    assert load(folder, generation_config="none").default_params == SamplingParams()
