"""What a client expects the output to be changes the number of passes, never the output."""

import pytest

from cllm_core.engine.drafters.copying import MAX_NGRAM
from cllm_core.request import SamplingParams
from tests.engine.factories import (
    Answer,
    Setup,
    decode_one,
    greedy_ar,
    make_engine,
    make_request,
    make_scripted_engine,
    plain_model,
)
from tests.engine.scripted import scripted_ar

PROMPT = (100, 31, 7, 250, 18)
NUM_NEW = 48


def decode_with(prediction_ids: list[int], block_length: int = 8) -> Answer:
    setup = Setup(block_length=block_length)
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW)
    return decode_one(make_engine("llama", setup), make_request("a", PROMPT, params, prediction_ids=prediction_ids))


def right_text() -> list[int]:
    return greedy_ar(plain_model("llama"), PROMPT, NUM_NEW)


@pytest.mark.parametrize("block_length", [2, 8, 16])
def test_a_right_prediction_is_accepted_by_the_block(block_length: int) -> None:
    answer = decode_with(right_text(), block_length)
    assert answer.token_ids == right_text()
    assert answer.stats.num_forward_passes == NUM_NEW // block_length


def test_a_wrong_prediction_leaves_the_output_as_it_is() -> None:
    answer = decode_with([token ^ 1 for token in right_text()])
    assert answer.token_ids == right_text()


def test_a_prediction_with_an_edited_word_is_taken_up_again_behind_it() -> None:
    prompt, num_new = tuple(range(2, 12)), 60
    text = scripted_ar(prompt, num_new)
    edited = [*text[:20], 63, *text[21:]]
    params = SamplingParams(temperature=0, max_tokens=num_new)
    passes = {}
    for name, prediction in (("none", []), ("right", text), ("edited", edited)):
        request = make_request(name, prompt, params, prediction_ids=prediction)
        answer = decode_one(make_scripted_engine(), request)
        assert answer.token_ids == text
        passes[name] = answer.stats.num_forward_passes
    assert passes["right"] <= passes["edited"] < passes["none"]


def test_a_plain_model_takes_a_prediction_up_again_few_tokens_behind_an_edit() -> None:
    """The draft's head used to be the model's own predictions from wrong text, which hid the prediction for good."""
    text = right_text()
    edited = [*text[:4], text[4] ^ 1, *text[5:]]
    answer = decode_with(edited, block_length=8)
    assert answer.token_ids == text
    # the passes of a right prediction, one for the window that the edit cut, and one for each token of the n-gram
    assert answer.stats.num_forward_passes <= NUM_NEW // 8 + 1 + MAX_NGRAM + 1


def test_a_prediction_longer_than_the_context_is_cut() -> None:
    setup = Setup(max_model_len=40)
    request = make_request("a", (2, 3), SamplingParams(temperature=0, max_tokens=20), prediction_ids=[5] * 500)
    assert decode_one(make_scripted_engine(setup), request).token_ids == scripted_ar((2, 3), 20)
