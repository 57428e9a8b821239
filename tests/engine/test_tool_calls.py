"""Whatever the weights: calls that the grammar of a tool format forces are valid, and the reader reads them."""

import json
from typing import Any, get_args

import jsonschema_rs
import pytest

from cllm_core.info import TokenizerBundle
from cllm_core.request import SamplingParams
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.dialect import Dialect, find_dialect
from cllm_core.text.stream import OutputText
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.grammar import CallRules
from cllm_core.text.tools.reader import join_calls
from cllm_core.text.tools.skeleton import ToolFormatChoice, ToolFormatName
from tests.checkpoints import CHATML_TEMPLATE, ENDOFTEXT_ID, IM_END_ID
from tests.engine.factories import Answer, Setup, decode, make_engine, make_request, tokenizer_json
from tests.text.test_stream import make_output

PROMPT = tuple(range(40, 57))
EOS = (IM_END_ID, ENDOFTEXT_ID)

PAINT_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "layers": {"type": "integer", "minimum": 1, "maximum": 9},
        "label": {"type": "string", "maxLength": 4},
    },
    "required": ["colour", "layers"],
}
PAINT = Function(name="paint", parameters=PAINT_SCHEMA)
STOP = Function(name="stop")
SCHEMAS: dict[str, dict[str, Any]] = {"paint": PAINT_SCHEMA, "stop": {"maxProperties": 0}}


def make_dialect(codec: TextCodec, chosen: ToolFormatChoice) -> Dialect:
    return find_dialect(ChatTemplate(CHATML_TEMPLATE), codec, tool_format=chosen, end_ids=EOS)


def sample(dialect: Dialect, rules: CallRules, *, block_length: int, max_tokens: int) -> list[Answer]:
    """One sample for each of several seeds."""
    grammar = dialect.answer_to("").grammar(rules, None)
    requests = [
        make_request(
            str(seed),
            PROMPT,
            SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, grammar=grammar),
        )
        for seed in range(6)
    ]
    engine = make_engine("llama", Setup(block_length=block_length))
    return list(decode(engine, requests).values())


def read(codec: TextCodec, dialect: Dialect, answer: Answer) -> tuple[str, tuple[FunctionCall, ...]]:
    text = OutputText(codec, syntax=dialect.answer_to("").syntax([PAINT, STOP]))
    delta = text.push(make_output(tuple(answer.token_ids), "length"))
    return delta.text, join_calls(delta.calls)


# With harmony the output may reason first, which random weights do without end.
@pytest.mark.parametrize("chosen", sorted({*get_args(ToolFormatName)} - {"harmony"}))
def test_a_required_call_is_one_of_the_functions_with_arguments_of_its_schema(chosen: ToolFormatName) -> None:
    codec = TextCodec(TokenizerBundle(tokenizer_json=tokenizer_json()))
    dialect = make_dialect(codec, chosen)
    rules = CallRules(functions=(PAINT, STOP), is_required=True, is_parallel=False)
    answers = sample(dialect, rules, block_length=16, max_tokens=300)
    for answer in answers:
        content, (call,) = read(codec, dialect, answer)
        assert (content, answer.finish_reason) == ("", "stop")
        assert jsonschema_rs.validator_for(SCHEMAS[call.name]).is_valid(json.loads(call.arguments))
    assert [answer.token_ids for answer in sample(dialect, rules, block_length=1, max_tokens=300)] == [
        answer.token_ids for answer in answers
    ]
