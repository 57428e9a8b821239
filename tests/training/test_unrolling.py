"""Unrolled drafts are what Jacobi decoding makes of them."""

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.training.examples import NoisyBlock
from cllm_core.training.model import PackedModel
from cllm_core.training.packing import PackedExample, PackLayout, build_layout
from cllm_core.training.unrolling import advance_drafts, count_blocks, learning_depths
from tests.training.factories import make_group, make_model, random_ids

PROMPT = (1, 2, 3)
ANSWER = (10, 11, 12, 13, 14, 15)
EXAMPLE = PackedExample(PROMPT, ANSWER, (NoisyBlock(1, (90, 12, 91), (12, 13, 14)), NoisyBlock(3, (92, 93), (14, 15))))


def drafts(layout: PackLayout) -> list[int]:
    """Draft tokens of the pack, in order."""
    tokens: list[int] = layout.input_ids[layout.row_index[layout.teacher_rows >= 0]].tolist()
    return tokens


def predictions(layout: PackLayout, of_drafts: list[int]) -> Tensor:
    """Those given for draft rows; clean rows predict -7, which must never be used."""
    predicted = torch.full_like(layout.target_ids, -7)
    predicted[layout.teacher_rows >= 0] = torch.tensor(of_drafts)
    return predicted


def test_an_iteration_sets_the_first_wrong_token_right_and_shifts_predictions_behind_it() -> None:
    layout = build_layout([[EXAMPLE]])
    advanced = advance_drafts(layout, predictions(layout, [50, 51, 52, 60, 61]), torch.tensor([True, True]))
    assert drafts(advanced) == [11, 50, 51, 13, 60]
    again = advance_drafts(advanced, predictions(layout, [70, 71, 72, 80, 81]), torch.tensor([True, True]))
    assert drafts(again) == [11, 12, 71, 13, 14]


def test_blocks_that_are_not_chosen_keep_their_drafts() -> None:
    layout = build_layout([[EXAMPLE], [EXAMPLE]])
    assert count_blocks(layout) == 4
    predicted = predictions(layout, list(range(50, 60)))
    advanced = advance_drafts(layout, predicted, torch.tensor([False, True, False, False]))
    assert drafts(advanced) == [90, 12, 91, 13, 53, 90, 12, 91, 92, 93]
    assert drafts(layout) == [90, 12, 91, 92, 93] * 2


def test_nothing_is_learned_from_before_the_first_wrong_token() -> None:
    layout = build_layout([[EXAMPLE]])
    is_draft = layout.teacher_rows >= 0
    assert learning_depths(layout)[is_draft].tolist() == [1, 2, 3, 1, 2]
    assert not learning_depths(layout)[~is_draft].any()
    advanced = advance_drafts(layout, predictions(layout, [12, 51, 0, 14, 0]), torch.tensor([True, True]))
    assert drafts(advanced) == [11, 12, 51, 13, 14]
    assert learning_depths(advanced)[is_draft].tolist() == [0, 0, 1, 0, 0]


@torch.no_grad()
def predicted_after(model: PreTrainedModel, text: tuple[int, ...]) -> list[int]:
    """The likeliest token after each token of the text."""
    tokens: list[int] = model(input_ids=torch.tensor([text])).logits[0].argmax(dim=-1).tolist()
    return tokens


def test_an_iteration_is_the_one_of_greedy_jacobi_decoding() -> None:
    reference = make_model(packed=False)
    prompt = random_ids(random.Random(0), 12)
    answer: tuple[int, ...] = ()
    for _ in range(8):
        answer += (predicted_after(reference, prompt + answer)[-1],)
    draft = tuple(token + 1 for token in answer[1:6])
    layout = build_layout([[PackedExample(prompt, answer, (NoisyBlock(1, draft, answer[2:7]),))]])
    advanced = advance_drafts(layout, PackedModel(make_model())._predicted(layout), torch.tensor([True]))
    assert drafts(advanced) == predicted_after(reference, prompt + answer[:1] + draft)[12:-1]


def test_unrolling_draws_as_the_generator_given_says() -> None:
    pack = build_layout([make_group(seed=1), make_group(seed=2)]).as_dict()
    packed = PackedModel(make_model(), unroll=3)
    losses = []
    for seed in (5, 5, 6, 7, 8):
        losses.append(packed(**packed.unrolled(pack, torch.Generator().manual_seed(seed)))["loss"].item())
    assert losses[0] == losses[1]
    assert len(set(losses)) > 1


def test_without_iterations_a_pack_stays_as_it_is() -> None:
    pack = build_layout([make_group(seed=1)]).as_dict()
    unrolled = PackedModel(make_model()).unrolled(pack, torch.Generator())
    assert all(torch.equal(unrolled[name], value) for name, value in pack.items())
