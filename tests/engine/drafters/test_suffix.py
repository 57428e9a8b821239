"""What past outputs propose, to whom, and in how much memory."""

import random
import subprocess
import sys
from typing import cast

import numpy as np
import pytest

from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.engine.drafters.base import DraftRow, SeenWindow
from cllm_core.engine.drafters.copying import copy_known
from cllm_core.engine.drafters.past_index import BYTES_PER_TOKEN, PastIndex
from cllm_core.engine.drafters.registry import Target, make_drafters
from cllm_core.engine.drafters.suffix import PastOutputs
from cllm_core.engine.plan import Admission
from cllm_core.engine.request_text import RequestText
from cllm_core.models.loader import LoadedModel
from cllm_core.request import SamplingParams
from tests.engine.factories import Answer, Setup, decode_one, make_engine, make_request

PROMPT = (40, 41, 42, 43)
ANNA, BERT = 1, 2**64 - 1
SMALL = 2**16


def find(index: PastIndex, owner: int, *text: int, num_tokens: int = 3) -> list[int]:
    tokens: list[int] = index.find(owner, np.array(text), num_tokens)[0].tolist()
    return tokens


def index_of(*texts: list[int], owner: int = ANNA, num_lead: int = 0) -> PastIndex:
    index = PastIndex(SMALL)
    for text in texts:
        index.add(owner, np.array(text), num_lead=num_lead)
    return index


def test_the_longest_match_is_continued() -> None:
    index = index_of([1, 2, 3, 4, 5, 6], [9, 9, 3, 4, 7, 8], [0, 3, 4, 7, 7])
    assert find(index, ANNA, 1, 2, 3, 4) == [5, 6]
    assert find(index, ANNA, 9, 9, 3, 4) == [7, 8]
    assert [index.find(ANNA, np.array(text), 1)[1] for text in ([1, 2, 3, 4], [0, 4], [99])] == [4, 1, 0]


def test_of_equal_matches_the_commonest_continuation_is_proposed_token_by_token() -> None:
    index = index_of([1, 5, 6], [1, 7, 8], [1, 7, 9], [1, 7, 8])
    assert find(index, ANNA, 0, 0, 1) == [7, 8]


def test_of_equally_common_continuations_the_latest_is_proposed() -> None:
    assert find(index_of([1, 5, 6], [1, 7, 8]), ANNA, 1) == [7, 8]


def test_a_continuation_ends_with_its_text() -> None:
    assert find(index_of([1, 2, 3], [4, 5, 6]), ANNA, 1, 2, num_tokens=9) == [3]
    assert find(index_of([1, 2, 3], [4, 5, 6]), ANNA, 2, 3) == []


def test_the_lead_is_matched_but_never_proposed() -> None:
    index = index_of([1, 2, 3, 4, 5], num_lead=3)
    assert find(index, ANNA, 1, 2, 3) == [4, 5]
    assert find(index, ANNA, 1) == []


def test_owners_never_see_each_others_texts() -> None:
    index = index_of([1, 2, 3])
    index.add(BERT, np.array([1, 2, 8]), num_lead=0)
    assert find(index, ANNA, 1, 2) == [3]
    assert find(index, BERT, 1, 2) == [8]
    assert find(index, 3, 1, 2) == []


def test_what_is_found_after_any_number_of_texts_is_what_the_latest_of_them_say() -> None:
    """The index is written over many times; whatever is proposed stands in a text that it still holds."""
    draw = random.Random(0)
    index = PastIndex(SMALL)
    texts: list[tuple[int, list[int]]] = []
    for _ in range(400):
        owner, text = draw.choice([ANNA, BERT]), [draw.randrange(6) for _ in range(draw.randrange(1, 60))]
        index.add(owner, np.array(text), num_lead=draw.randrange(len(text)))
        texts.append((owner, text))
        context = draw.choice(texts)[1][:5]
        found = find(index, owner, *context)
        match = [context[-1], *found[:1]]
        if found:
            held = [text for whose, text in texts[-index.num_tokens // 2 :] if whose == owner]
            assert any(text[i : i + 2] == match for text in held for i in range(len(text)))
    assert sum(len(text) + 1 for _, text in texts) > 4 * index.num_tokens


def test_a_text_longer_than_the_index_leaves_its_end() -> None:
    index = PastIndex(SMALL)
    index.add(ANNA, np.arange(3 * index.num_tokens), num_lead=1)
    last = 3 * index.num_tokens - 1
    assert find(index, ANNA, last - 3, last - 2, last - 1) == [last]
    assert find(index, ANNA, 10, 11, 12) == []


@pytest.mark.parametrize("num_bytes", [2**16, 2**20, 5_000_000])
def test_the_memory_is_counted_and_within_its_bound(num_bytes: int) -> None:
    index = PastIndex(num_bytes)
    assert num_bytes - 2 * BYTES_PER_TOKEN < index.num_bytes <= num_bytes


# In a process of its own: a large one reuses memory that it holds already.
_MEASURE = """
import psutil
from cllm_core.engine.drafters.past_index import PastIndex
PastIndex(2**20)
before = psutil.Process().memory_info().rss
index = PastIndex(32 * 2**20)
print(index.num_bytes, psutil.Process().memory_info().rss - before)
"""


def test_the_counted_memory_is_what_the_process_takes() -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
    counted, grown = map(int, done.stdout.split())
    assert counted == pytest.approx(32 * 2**20, rel=0.01)
    assert grown == pytest.approx(counted, rel=0.05)


def test_what_memory_grew_by_is_told() -> None:
    config = EngineConfig(drafters=("own", "suffix"), suffix_memory_mib=400)
    own, past = make_drafters(Target(config, cast(LoadedModel, None), cast(PagedModel, None)))
    assert own.info.num_bytes == 0
    assert past.info.resident_bytes == pytest.approx(past.info.num_bytes, rel=0.05)


def ask_twice(first_salt: str, second_salt: str) -> tuple[Answer, Answer]:
    """The same question twice, to a model whose text never repeats itself within an answer."""
    engine = make_engine("llama", Setup(drafters=("suffix", "own"), block_length=8, max_model_len=80))
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True)
    first = decode_one(engine, make_request("a", PROMPT, params, cache_salt=first_salt))
    return first, decode_one(engine, make_request("b", PROMPT, params, cache_salt=second_salt))


def test_an_answer_given_before_takes_few_passes() -> None:
    first, second = ask_twice("", "")
    assert second.token_ids == first.token_ids
    assert second.stats.num_forward_passes == 40 // 8
    assert first.stats.num_forward_passes > 30


def test_answers_to_others_are_not_to_be_noticed() -> None:
    first, second = ask_twice("anna", "bert")
    assert second.token_ids == first.token_ids
    assert second.stats.num_forward_passes == first.stats.num_forward_passes


class OneText:
    """A text of a request in slot 0, as the runner keeps it."""

    def __init__(self, source: PastOutputs, *, stop_token_ids: tuple[int, ...] = ()) -> None:
        request = make_request("a", PROMPT)
        admission = Admission(0, request, 0, request.prompt_ids, block_length=8, stop_token_ids=stop_token_ids)
        self.text = RequestText(admission, max_model_len=80)
        self.source = source
        source.begin(0, self.text)

    def accept(self, *token_ids: int) -> None:
        self.text.write_draft(len(PROMPT), token_ids)
        self.source.observe(SeenWindow(0, self.text, len(PROMPT), token_ids, len(token_ids)))

    def draft(self) -> list[int]:
        copies = copy_known(np.array(PROMPT), num_prompt=len(PROMPT), prediction=np.array([]), num_tokens=6)
        (proposal,) = self.source.propose([DraftRow(0, self.text, len(PROMPT), 6, copies)])
        return [] if proposal is None else proposal.tokens.tolist()


def test_tokens_accepted_behind_the_end_are_not_remembered() -> None:
    source = PastOutputs(SMALL)
    OneText(source, stop_token_ids=(33,)).accept(31, 32, 33, 34, 35)
    source.end(0)
    assert OneText(source).draft() == [31, 32, 33]


def test_a_request_that_leaves_without_an_output_leaves_nothing() -> None:
    source = PastOutputs(SMALL)
    OneText(source)
    source.end(0)
    assert OneText(source).draft() == []
