"""An output with a grammar matches it, and Jacobi output is still what decoding token by token gives."""

import json
import re
from functools import cache

import numpy as np
import pytest
import torch

from cllm_core.info import TokenizerBundle
from cllm_core.request import NewRequest, SamplingParams
from cllm_core.text.codec import TextCodec
from cllm_core.text.grammar import choice_grammar, json_grammar, regex_grammar
from cllm_core.text.grammar_compiler import GrammarCompiler
from tests.checkpoints import ENDOFTEXT_ID, IM_END_ID, VOCAB_SIZE
from tests.engine.factories import (
    Answer,
    Reader,
    Setup,
    decode,
    decode_one,
    make_engine,
    make_request,
    plain_model,
    tokenizer_json,
)

BLOCK_LENGTHS = (1, 2, 5, 16, 32)
PROMPT = tuple(range(40, 57))
MAX_TOKENS = 60
EOS = (IM_END_ID, ENDOFTEXT_ID)

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["reader", "writer"]},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 2},
    },
    "required": ["first_name", "kind", "ages"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": json_grammar(PERSON),
    "regex": regex_grammar(r"[a-f]{3,9}-(the server|the client)[0-9]+;"),
    "choice": choice_grammar(["yes", "yes, of course", "no"]),
    "open end": regex_grammar("[a-z ]*"),
}


@cache
def codec() -> TextCodec:
    return TextCodec(TokenizerBundle(tokenizer_json=tokenizer_json()))


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer_json(), VOCAB_SIZE, EOS)


@cache
@torch.inference_mode()
def greedy_ar(grammar: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """One token at a time: transformers' logits, the matcher's mask, the likeliest token left."""
    matcher = compiler().matcher(grammar)
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in EOS):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:VOCAB_SIZE]
        allowed = np.flatnonzero(bits)
        if set(allowed) <= set(EOS):
            output.append(EOS[0])
            break
        logits = plain_model("llama")(torch.tensor([[*PROMPT, *output]])).logits[0, -1]
        output.append(int(allowed[logits[allowed].argmax()]))
        matcher.consume_token(output[-1])
    return output


def request(
    grammar: str, request_id: str = "a", *, prediction: list[int] | None = None, **params: object
) -> NewRequest:
    settings = SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, "grammar": grammar, **params})  # type: ignore[arg-type]
    return make_request(request_id, PROMPT, settings, prediction_ids=prediction or ())


def text_of(answer: Answer) -> str:
    return codec().decode(answer.token_ids)


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_jacobi_output_is_that_of_masked_decoding_token_by_token(grammar: str, block_length: int) -> None:
    expected = greedy_ar(grammar)
    wrong_in_part = [*expected[:7], 99, *expected[8:]]
    engine = make_engine("llama", Setup(block_length=block_length))
    answers = decode(engine, [request(grammar), request(grammar, "b", prediction=wrong_in_part)])
    assert [answer.token_ids for answer in answers.values()] == [expected, expected]


@pytest.mark.parametrize("block_length", BLOCK_LENGTHS[1:])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_the_same_sample_is_drawn_at_every_block_length(block_length: int, penalty: float) -> None:
    def sampled(block_length: int) -> list[Answer]:
        requests = [
            request(
                grammar,
                f"{name} {seed}",
                temperature=1.2,
                top_p=0.9,
                seed=seed,
                presence_penalty=penalty,
                block_length=block_length,
            )
            for name, grammar in GRAMMARS.items()
            for seed in range(3)
        ]
        return list(decode(make_engine("llama"), requests).values())

    expected = sampled(1)
    assert [answer.token_ids for answer in sampled(block_length)] == [answer.token_ids for answer in expected]
    assert len({text_of(answer) for answer in expected}) > len(GRAMMARS)


@pytest.mark.parametrize("block_length", [1, 16])
def test_complete_outputs_match_and_end_at_an_end_of_sequence(block_length: int) -> None:
    requests = [
        request(json_grammar(PERSON), str(seed), temperature=1.5, seed=seed, block_length=block_length, max_tokens=200)
        for seed in range(12)
    ]
    for answer in decode(make_engine("qwen3"), requests).values():
        assert (answer.finish_reason, answer.stop_token_id) == ("stop", answer.token_ids[-1])
        person = json.loads(text_of(answer))
        assert list(person) == ["first_name", "kind", "ages"]
        assert person["kind"] in ("reader", "writer")


def test_forced_tokens_are_accepted_without_being_guessed() -> None:
    """A random model on a text it could never guess; the choice of its first letter decides all that follows."""
    grammar = choice_grammar(["a server reads the request", "the client reads the stream"])
    answer = decode_one(make_engine("llama", Setup(block_length=32)), request(grammar))
    plain = decode_one(make_engine("llama", Setup(block_length=1)), request(grammar))
    assert answer.token_ids == plain.token_ids
    assert answer.stats.num_forward_passes <= 5 < plain.stats.num_forward_passes


def test_preempted_and_mixed_requests_change_nothing() -> None:
    setup = Setup(num_blocks=26, max_batched_tokens=19, max_num_seqs=4)
    reader = Reader(make_engine("llama", setup))
    names = list(GRAMMARS)
    for index in range(8):
        reader.add(request(GRAMMARS[names[index % 4]], str(index)))
        free = SamplingParams(temperature=0, max_tokens=20)
        reader.add(make_request(f"free {index}", PROMPT[: index + 1], free))
        reader.step()
    answers = reader.drain()
    assert [answers[str(i)].token_ids for i in range(8)] == [greedy_ar(GRAMMARS[names[i % 4]]) for i in range(8)]
    assert sum(answer.stats.num_preemptions for answer in answers.values()) > 0


def test_a_request_without_a_grammar_is_not_touched_by_one_beside_it() -> None:
    free = SamplingParams(temperature=0, max_tokens=20)
    alone = decode_one(make_engine("llama"), make_request("a", PROMPT[:5], free))
    beside = decode(make_engine("llama"), [request(GRAMMARS["schema"], "b"), make_request("a", PROMPT[:5], free)])
    assert beside["a"].token_ids == alone.token_ids


@pytest.mark.parametrize("block_length", [1, 16])
def test_min_tokens_holds_the_end_back_where_the_grammar_has_more_to_say(block_length: int) -> None:
    wish = {IM_END_ID: 100.0, ENDOFTEXT_ID: 100.0}
    longer = request(regex_grammar("[a-z]*"), min_tokens=7, logit_bias=wish, block_length=block_length)
    complete = request(choice_grammar(["no"]), "b", min_tokens=7, block_length=block_length)
    answers = decode(make_engine("llama"), [longer, complete])
    assert len(answers["a"].token_ids) == 8
    assert (text_of(answers["b"]), answers["b"].finish_reason) == ("no", "stop")


def test_stop_tokens_cut_an_output_to_the_beginning_of_a_match() -> None:
    whole = greedy_ar(GRAMMARS["schema"])
    stop = whole[9]
    answer = decode_one(make_engine("llama"), request(GRAMMARS["schema"], stop_token_ids=(stop,)))
    assert answer.token_ids == whole[: whole.index(stop) + 1]
    assert (answer.finish_reason, answer.stop_token_id) == ("stop", stop)


def test_biases_choose_among_the_allowed_tokens_only() -> None:
    tokens = codec().encode("z!", add_special_tokens=False)
    wish = dict.fromkeys((IM_END_ID, *tokens), 100.0)
    answer = decode_one(make_engine("llama"), request(regex_grammar("[x-z]{9}"), logit_bias=wish))
    assert text_of(answer) == "z" * 9


def test_logprobs_are_reported_for_every_token_under_a_grammar() -> None:
    answer = decode_one(make_engine("llama"), request(GRAMMARS["schema"], logprobs=2))
    assert len(answer.logprobs) == len(answer.token_ids)
    assert all(np.isfinite(one.logprob) and one.logprob <= 0 for one in answer.logprobs)


@pytest.mark.parametrize("with_others", [True, False])
def test_a_text_that_cannot_go_on_ends_its_request_alone(with_others: bool) -> None:
    dead_end = 'start: "ab" DEAD\nDEAD: /[b-y]+z/ & /[c-z]+y/'  # what follows "ab" ends in z and in y
    others = [request(GRAMMARS["choice"], "b")] if with_others else []
    answers = decode(make_engine("llama"), [request(dead_end), *others])
    assert answers["a"].finish_reason == "error"
    assert "grammar" in (answers["a"].error or "")
    assert all(answers[other.request_id].token_ids == greedy_ar(GRAMMARS["choice"]) for other in others)


def test_an_aborted_request_gives_its_blocks_back() -> None:
    reader = Reader(make_engine("llama"))
    reader.add(request(GRAMMARS["open end"], temperature=2.0, seed=1))
    reader.step()
    reader.engine.abort("a")
    assert reader.drain()["a"].finish_reason == "abort"


def test_choices_of_one_call_differ_and_all_match() -> None:
    grammar = regex_grammar("[a-z]{8}")
    params = SamplingParams(temperature=1.0, seed=1, grammar=grammar)
    requests = [make_request(str(i), PROMPT, params, choice_index=i) for i in range(4)]
    texts = [text_of(answer) for answer in decode(make_engine("llama"), requests).values()]
    assert len(set(texts)) == 4
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
