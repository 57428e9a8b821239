"""Bad requests are refused by name and value, good ones go on; the statistics tell what happened."""

from typing import Any

import pytest

from cllm_core.engine.engine import Engine
from cllm_core.errors import InvalidRequest, PromptTooLong, RequestError
from cllm_core.request import NewRequest, SamplingParams
from tests.engine.factories import Reader, Setup, decode, decode_one, make_engine, make_request, make_scripted_engine
from tests.engine.scripted import EOS, VOCAB_SIZE, scripted_ar

CONTEXT = 40
PROMPT = tuple(range(2, 12))


def make_small_engine() -> Engine:
    return make_scripted_engine(Setup(max_model_len=CONTEXT))


def request_with(
    prompt_ids: tuple[int, ...] = PROMPT, *, prediction_ids: tuple[int, ...] = (), **params: Any
) -> NewRequest:
    return make_request("bad", prompt_ids, SamplingParams(temperature=0, **params), prediction_ids=prediction_ids)


BAD_REQUESTS = [
    (request_with(()), InvalidRequest, "prompt", "empty"),
    (request_with((2, VOCAB_SIZE)), InvalidRequest, "prompt", rf"token id {VOCAB_SIZE}: valid ids are 0\.\."),
    (request_with((2, -1)), InvalidRequest, "prompt", "token id -1"),
    (request_with(prediction_ids=(2, 99)), InvalidRequest, "prediction", "token id 99"),
    (request_with(logit_bias={64: 1.0}), InvalidRequest, "logit_bias", "token id 64"),
    (request_with(stop_token_ids=(3, 64)), InvalidRequest, "stop_token_ids", "token id 64"),
    (request_with(drafters=("own", "medium")), InvalidRequest, "drafters", "no 'medium'; it has own, copy"),
    (request_with((2,) * CONTEXT), PromptTooLong, "prompt", f"{CONTEXT} prompt tokens do not fit"),
    (request_with(max_tokens=CONTEXT - 9), PromptTooLong, "prompt", "10 prompt tokens and max_tokens=31"),
]


@pytest.mark.parametrize(("request_", "error", "param", "message"), BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_next_one_works(
    request_: NewRequest, error: type[RequestError], param: str, message: str
) -> None:
    engine = make_small_engine()
    with pytest.raises(error, match=message) as caught:
        engine.add_request(request_)
    assert caught.value.param == param
    assert not engine.has_work()
    assert decode_one(engine, make_request("good", PROMPT)).token_ids == scripted_ar(PROMPT, CONTEXT - len(PROMPT))


def test_an_id_in_use_is_refused_until_its_request_has_ended() -> None:
    engine = make_small_engine()
    reader = Reader(engine)
    reader.add(make_request("a", PROMPT))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.add_request(make_request("a", PROMPT))
    reader.drain()
    decode_one(engine, make_request("a", PROMPT))


def test_the_longest_request_that_fits_is_served_to_its_last_token() -> None:
    params = SamplingParams(temperature=0, max_tokens=1)
    answer = decode_one(make_small_engine(), make_request("a", (2,) * (CONTEXT - 1), params))
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


def test_without_max_tokens_the_output_ends_with_the_context() -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    answer = decode_one(make_small_engine(), make_request("a", PROMPT, params))
    assert (len(answer.token_ids), answer.finish_reason) == (CONTEXT - len(PROMPT), "length")


def end_token_prompt() -> tuple[int, ...]:
    """A prompt whose scripted text reaches the end of sequence early."""
    return next((word, 3, 5) for word in range(2, VOCAB_SIZE) if scripted_ar((word, 3, 5), 30)[-1] == EOS)


def test_output_ends_at_the_end_of_sequence_unless_it_is_ignored() -> None:
    prompt = end_token_prompt()
    stopped = decode_one(make_small_engine(), make_request("a", prompt))
    assert (stopped.finish_reason, stopped.stop_token_id, stopped.token_ids[-1]) == ("stop", EOS, EOS)
    goes_on = decode_one(make_small_engine(), make_request("a", prompt, SamplingParams(temperature=0, ignore_eos=True)))
    assert goes_on.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert goes_on.finish_reason == "length"


def test_output_ends_at_a_stop_token_of_the_request() -> None:
    text = scripted_ar(PROMPT, 20)
    params = SamplingParams(temperature=0, stop_token_ids=(text[6],))
    answer = decode_one(make_small_engine(), make_request("a", PROMPT, params))
    assert answer.token_ids == text[: text.index(text[6]) + 1]
    assert answer.stop_token_id == text[6]


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_reports_once_and_frees_everything(num_steps: int) -> None:
    reader = Reader(make_scripted_engine(Setup(max_batched_tokens=8)))
    reader.add(make_request("a", PROMPT))
    for _ in range(num_steps):
        reader.step()
    reader.engine.abort("a")
    reader.engine.abort("unknown")
    assert reader.engine.has_work()
    assert reader.drain()["a"].finish_reason == "abort"


def test_a_known_prefix_is_not_computed_again() -> None:
    engine = make_scripted_engine()
    params = SamplingParams(temperature=0, max_tokens=8)
    prompt = tuple(range(2, 25))
    first = decode_one(engine, make_request("a", prompt, params))
    longer = decode_one(engine, make_request("b", (*prompt, *first.token_ids, 9), params))
    salted = decode_one(engine, make_request("c", prompt, params, cache_salt="c"))
    assert first.stats.num_cached_tokens == salted.stats.num_cached_tokens == 0
    assert longer.stats.num_cached_tokens == 28  # full blocks of the 30 tokens computed for the first
    assert salted.token_ids == first.token_ids


@pytest.mark.parametrize("block_length", [1, 8])
def test_equal_prompts_at_once_get_the_answers_of_each_alone(block_length: int) -> None:
    """All but the first read blocks that the first writes in the same step."""
    prompt = tuple(range(3, 60))
    params = SamplingParams(seed=7, max_tokens=20, block_length=block_length)
    requests = [make_request(str(i), prompt, params, choice_index=i) for i in range(6)]
    together = decode(make_engine("llama"), requests)
    alone = {request.request_id: decode_one(make_engine("llama"), request) for request in requests}
    assert {key: answer.token_ids for key, answer in together.items()} == {
        key: answer.token_ids for key, answer in alone.items()
    }
    assert [answer.stats.num_cached_tokens for answer in together.values()] == [0] + [56] * 5


def test_a_known_prefix_shortens_the_step() -> None:
    engine = make_scripted_engine(Setup(block_length=1))
    for request_id, num_tokens in (("a", 23), ("b", 23 - 20)):
        engine.add_request(make_request(request_id, range(2, 25), SamplingParams(temperature=0, max_tokens=1)))
        engine.step()
        assert engine.stats().num_step_tokens == num_tokens


def test_statistics_describe_the_state_and_the_last_step() -> None:
    engine = make_scripted_engine(Setup(max_num_seqs=1, num_blocks=50))
    assert engine.stats().num_free_blocks == engine.stats().num_cache_blocks == 50
    for request_id in "ab":
        engine.add_request(make_request(request_id, PROMPT))
    outputs = engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert stats.accepted_per_row == (len(outputs[0].token_ids),)
    assert stats.num_step_tokens == len(PROMPT) + 15
    assert stats.num_free_blocks == 50 - 7  # 25 tokens in blocks of 4


def test_accepted_tokens_are_counted_up_to_the_end_of_their_output() -> None:
    """The text repeats itself, so that windows are right beyond a stop token within it."""
    engine = make_scripted_engine(Setup(block_length=8))
    for number in range(40):
        params = SamplingParams(temperature=0, max_tokens=60, stop_token_ids=(10 + number,))
        engine.add_request(make_request(str(number), range(2 + number % 20, 25), params))
    num_accepted = num_output = 0
    while engine.has_work():
        num_output += sum(len(output.token_ids) for output in engine.step())
        num_accepted += sum(engine.stats().accepted_per_row)
    assert num_accepted == num_output


def test_an_observer_sees_each_window_with_its_predictions() -> None:
    engine = make_scripted_engine(Setup(block_length=4))
    seen: list[tuple[int, ...]] = []
    engine.observer = lambda plan, result: seen.extend(row.accepted_ids for row in result.rows)
    answers = decode(engine, [make_request("a", PROMPT, SamplingParams(temperature=0, max_tokens=20))])
    assert [token for accepted in seen for token in accepted] == answers["a"].token_ids
    assert all(1 <= len(accepted) <= 4 for accepted in seen)
