"""Predictions that were not confirmed are proposed where the text comes to the same token again."""

import numpy as np

from cllm_core.engine.drafters.base import DraftRow, SeenWindow
from cllm_core.engine.drafters.copying import copy_known
from cllm_core.engine.drafters.pool import RejectedPredictions
from cllm_core.engine.plan import Admission
from cllm_core.engine.request_text import RequestText
from tests.engine.factories import make_request

PROMPT = (40, 41, 42)


class OneText:
    """The text of a request in a slot, as the runner keeps it."""

    def __init__(self, source: RejectedPredictions, slot: int = 0) -> None:
        request = make_request("a", PROMPT)
        admission = Admission(slot, request, 0, request.prompt_ids, block_length=8, stop_token_ids=())
        self.text = RequestText(admission, max_model_len=80)
        self.source, self.slot, self.text_end = source, slot, len(PROMPT)
        source.begin(slot, self.text)

    def see(self, *predicted: int, num_accepted: int) -> None:
        self.text.write_draft(self.text_end, predicted)
        self.source.observe(SeenWindow(self.slot, self.text, self.text_end, predicted, num_accepted))
        self.text_end += num_accepted

    def draft(self) -> list[int]:
        known = self.text.tokens(0, self.text_end)
        copies = copy_known(known, num_prompt=len(PROMPT), prediction=np.array([]), num_tokens=3)
        (proposal,) = self.source.propose([DraftRow(self.slot, self.text, self.text_end, 3, copies)])
        return [] if proposal is None else proposal.tokens.tolist()


def test_what_was_predicted_behind_a_token_is_proposed_when_it_comes() -> None:
    text = OneText(RejectedPredictions())
    text.see(11, 21, 22, 23, 24, num_accepted=1)
    text.see(31, 22, num_accepted=2)  # 22 comes at another place
    assert text.draft() == [23, 24]


def test_what_was_accepted_is_not_recycled() -> None:
    text = OneText(RejectedPredictions())
    text.see(11, 12, 13, 14, num_accepted=4)
    text.see(11, num_accepted=1)
    assert text.draft() == []


def test_requests_have_pools_of_their_own() -> None:
    source = RejectedPredictions()
    OneText(source, slot=0).see(11, 21, 22, num_accepted=1)
    other = OneText(source, slot=1)
    other.see(21, num_accepted=1)
    assert other.draft() == []
    again = OneText(source, slot=0)  # the next request of the slot
    again.see(21, num_accepted=1)
    assert again.draft() == []
