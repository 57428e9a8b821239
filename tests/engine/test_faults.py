"""Faults of one request or one step, and that they harm no other: values that are not finite, memory that runs out."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cllm_core.engine.engine import Engine
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.paged import RowSpan
from tests.checkpoints import build_model
from tests.engine.factories import Answer, Reader, Setup, decode, engine_over, make_request, make_scripted_engine
from tests.engine.scripted import scripted_ar

BEFORE_POISON, POISON = 51, 7  # in this order, which no draft has
GOOD = {f"good-{i}": tuple(range(10 + i, 30 + i)) for i in range(3)}
BAD = (*range(40, 52), POISON, *range(52, 60))


def make_poisoned_engine(*, num_blocks: int) -> Engine:
    """The embedding of POISON is not a number, as a broken weight or a flipped bit in the memory would make it."""
    register_paged_attention()
    model = build_model("llama")
    model.set_attn_implementation(PAGED_ATTENTION)

    def poison(_: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        is_poison = (inputs[0] == POISON) & (inputs[0].roll(1) == BEFORE_POISON)
        return output.masked_fill(is_poison[..., None], float("nan"))

    model.get_input_embeddings().register_forward_hook(poison)
    return engine_over(model, Setup(num_blocks=num_blocks, max_model_len=40))


def good_answers(engine: Engine, *more: tuple[str, tuple[int, ...]]) -> dict[str, Answer]:
    return decode(engine, [make_request(name, prompt) for name, prompt in (*GOOD.items(), *more)])


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answers[name].token_ids for name in GOOD}


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    quiet = tokens(good_answers(make_poisoned_engine(num_blocks=40)))
    engine = make_poisoned_engine(num_blocks=40)
    answers = good_answers(engine, ("bad", BAD))
    assert (answers["bad"].finish_reason, answers["bad"].token_ids) == ("error", [])
    assert "not finite" in (answers["bad"].error or "")
    assert tokens(answers) == quiet


def test_cache_blocks_that_held_values_which_are_not_finite_harm_nobody_later() -> None:
    """Masked slots are multiplied by 0, and 0 times not-a-number is not-a-number."""
    quiet = tokens(good_answers(make_poisoned_engine(num_blocks=40)))
    engine = make_poisoned_engine(num_blocks=40)
    for round_number in range(4):  # in one of them the good requests get the bad one's blocks
        assert decode(engine, [make_request("bad", BAD)])["bad"].finish_reason == "error"
        assert decode(engine, [make_request("short", BAD[:10])])["short"].finish_reason != "error", round_number
        assert tokens(good_answers(engine)) == quiet


def limit_memory(engine: Engine, is_too_much: Callable[[int], bool]) -> list[int]:
    """Let steps of too many tokens run out of memory; the sizes of those that do not are returned as they come."""
    forward, sizes = engine.runner.model.forward, list[int]()

    def limited(input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        if is_too_much(len(input_ids)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(input_ids))
        return forward(input_ids, positions, rows, sampled)

    engine.runner.model.forward = limited  # type: ignore[method-assign]
    return sizes


def test_steps_that_run_out_of_memory_are_planned_again_smaller_and_change_no_output() -> None:
    engine = make_scripted_engine()
    sizes = limit_memory(engine, lambda size: size > 11)
    prompts = {str(i): tuple(range(2 + i, 32 + i)) for i in range(8)}
    answers = decode(engine, [make_request(name, prompt) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        assert answers[name].token_ids == scripted_ar(prompt, len(answers[name].token_ids))
        assert answers[name].finish_reason in ("stop", "length")
    assert max(sizes) <= 11


def test_steps_grow_again_once_there_is_memory() -> None:
    engine, is_short = make_scripted_engine(), [True]
    sizes = limit_memory(engine, lambda size: is_short[0] and size > 8)
    decode(engine, [make_request("first", range(2, 62))])
    assert max(sizes) <= 8
    is_short[0] = False
    for number in range(60):
        decode(engine, [make_request(str(number), [2 + number % 50] * 62, cache_salt=str(number))])
    assert max(sizes) == engine.scheduler.max_batched_tokens


def test_a_request_that_no_step_is_small_enough_for_ends_and_the_next_one_is_served() -> None:
    engine, is_short = make_scripted_engine(), [True]
    limit_memory(engine, lambda _: is_short[0])
    reader = Reader(engine)
    for name in "ab":
        reader.add(make_request(name, range(2, 20)))
    answers = reader.drain()
    assert {answer.finish_reason for answer in answers.values()} == {"error"}
    assert "memory" in (answers["a"].error or "")
    is_short[0] = False
    assert decode(engine, [make_request("c", range(2, 20))])["c"].finish_reason in ("stop", "length")


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory() -> None:
    engine = make_scripted_engine()

    def fail(*_: object) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine.runner.model.forward = fail  # type: ignore[method-assign,assignment]
    engine.add_request(make_request("a", range(2, 20)))
    with pytest.raises(RuntimeError, match="device-side"):
        engine.step()
