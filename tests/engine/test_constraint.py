"""A constraint follows accepted tokens, and no walk over a draft leaves a trace in it."""

from functools import cache
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_core.engine import constraint as constraint_module
from cllm_core.engine import grammar_masks as grammar_masks_module
from cllm_core.engine.constraint import Constraint, Masks
from cllm_core.engine.grammar_masks import ConstrainedWindow, MaskFiller
from cllm_core.info import TokenizerBundle
from cllm_core.text.codec import TextCodec
from cllm_core.text.grammar import choice_grammar, json_grammar, regex_grammar
from cllm_core.text.grammar_compiler import GrammarCompiler
from tests.checkpoints import ENDOFTEXT_ID, IM_END_ID, IM_START_ID, VOCAB_SIZE
from tests.engine.factories import tokenizer_json

EOS = (IM_END_ID, ENDOFTEXT_ID)
LIST = json_grammar({"type": "array", "items": {"enum": ["red", "blue"]}})


@cache
def codec() -> TextCodec:
    return TextCodec(TokenizerBundle(tokenizer_json=tokenizer_json()))


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer_json(), VOCAB_SIZE, EOS)


def make_constraint(grammar: str, *, min_tokens: int = 0, stop_token_ids: tuple[int, ...] = ()) -> Constraint:
    return Constraint(
        compiler().matcher(grammar),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=EOS,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
    )


def ids(text: str) -> list[int]:
    return codec().encode(text, add_special_tokens=False)


def allowed(constraint: Constraint, draft: list[int]) -> list[set[int]]:
    """Token ids that each mask allows, of the positions that have one."""
    masks = np.zeros((len(draft) + 1, constraint.num_words), dtype=np.int32)
    return bits(masks[: constraint.fill_masks(draft, masks)])


def bits(masks: Masks) -> list[set[int]]:
    unpacked = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in unpacked]


tokens = st.integers(0, VOCAB_SIZE - 1)


@given(st.lists(tokens, max_size=12), st.sampled_from([LIST, regex_grammar("(a|aa)*b{2,5}"), regex_grammar("[^x]*")]))
def test_masks_along_a_draft_are_those_of_following_it_token_by_token(draft: list[int], grammar: str) -> None:
    constraint, follower = make_constraint(grammar), make_constraint(grammar)
    draft = constraint.redraft(draft)
    for position, mask in enumerate(allowed(constraint, draft)):
        assert mask == allowed(follower, [])[0]
        if position < len(draft) and draft[position] in mask and draft[position] not in EOS:
            follower.accept(draft[position : position + 1])


def test_masks_end_at_the_first_token_that_is_refused() -> None:
    constraint = make_constraint(regex_grammar("[a-c]*"))
    assert [len(allowed(constraint, ids(text))) for text in ("abcab", "abxab", "xab")] == [6, 3, 1]


def test_only_masked_predictions_are_taken() -> None:
    constraint = make_constraint(regex_grammar("[a-c]*"))
    allowed(constraint, ids("abxab"))
    assert constraint.clip((7, 8, 9, 10)) == (7, 8, 9)


def test_special_tokens_are_never_allowed_within_a_text() -> None:
    mask = allowed(make_constraint(json_grammar({"type": "string"})), ids('"<|im'))[-1]
    assert not mask & {*EOS, IM_START_ID}


def test_every_end_of_sequence_is_allowed_where_the_text_may_go_on_and_one_where_it_may_not() -> None:
    assert set(EOS) < allowed(make_constraint(regex_grammar("a*")), [])[0]
    assert allowed(make_constraint(choice_grammar(["a"])), ids("a"))[-1] == {EOS[0]}


def test_what_is_forced_stands_at_the_head_of_the_draft_and_behind_refused_tokens() -> None:
    constraint = make_constraint(LIST)
    assert codec().decode(constraint.forced_ids).startswith("[")
    draft = constraint.redraft([*constraint.forced_ids, *ids('"r'), *[IM_START_ID] * 20])
    assert codec().decode(draft).startswith('["red"')


def test_the_end_is_drafted_where_nothing_else_can_follow() -> None:
    constraint = make_constraint(choice_grammar(["yes"]))
    assert constraint.forced_ids == (*ids("yes"), EOS[0])
    assert constraint.redraft([IM_START_ID] * 9)[: len(constraint.forced_ids)] == list(constraint.forced_ids)


def test_stop_tokens_wait_for_min_tokens_unless_nothing_else_is_left() -> None:
    (stop,) = ids("b")
    constraint = make_constraint(regex_grammar("[ab]{1,3}"), min_tokens=2, stop_token_ids=(stop,))
    masks = allowed(constraint, ids("aaa"))
    assert [stop in mask for mask in masks] == [False, False, True, False]
    assert masks[3] == {EOS[0]}


@given(st.lists(st.tuples(st.lists(tokens, max_size=6), st.booleans()), min_size=2, max_size=5), st.integers(0, 3))
def test_masks_of_many_windows_at_once_are_those_of_each_alone(
    drafts: list[tuple[list[int], bool]], min_tokens: int
) -> None:
    grammars = [LIST, regex_grammar("(a|aa)*b{2,5}"), regex_grammar("[^x]*"), choice_grammar(["yes"]), LIST]
    apart, together = (
        [make_constraint(grammar, min_tokens=min_tokens) for grammar in grammars[: len(drafts)]] for _ in range(2)
    )
    fitting = [one.redraft(draft) if fits else draft for one, (draft, fits) in zip(apart, drafts, strict=True)]
    expected = [allowed(one, draft) for one, draft in zip(apart, fitting, strict=True)]
    for one in together:
        one.is_quick = True
    firsts = [0, *accumulate(len(draft) + 1 for draft in fitting)]
    windows = [ConstrainedWindow(*window) for window in zip(together, fitting, firsts[:-1], strict=True)]
    masks = np.zeros((firsts[-1], together[0].num_words), dtype=np.int32)
    counts = MaskFiller(num_threads=2).fill(windows, masks)
    assert counts == [len(one) for one in expected]
    for window, count, masks_alone in zip(windows, counts, expected, strict=True):
        assert bits(masks[window.first_mask :][:count]) == masks_alone
        assert together[0].clip((1, 2, 3, 4, 5, 6, 7)) == apart[0].clip((1, 2, 3, 4, 5, 6, 7))


def test_a_step_of_slow_masks_is_followed_by_a_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    constraints = [make_constraint(regex_grammar("[a-c]*")) for _ in range(3)]
    for one in constraints:
        allowed(one, ids("abc"))
        assert one.is_quick
    monkeypatch.setattr(grammar_masks_module, "QUICK_SECONDS", 0.0)
    windows = [ConstrainedWindow(one, ids("ab"), 3 * index) for index, one in enumerate(constraints)]
    masks = np.zeros((9, constraints[0].num_words), dtype=np.int32)
    assert MaskFiller(num_threads=2).fill(windows, masks) == [3, 3, 3]
    assert not any(one.is_quick for one in constraints)


def test_slow_masks_leave_the_rest_of_the_window_to_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "_STEP_SECONDS", 0.0)
    constraint = make_constraint(regex_grammar("[a-c]*"))
    assert len(allowed(constraint, ids("abc"))) == 1
    assert constraint.clip((1, 2, 3)) == (1,)


def test_a_grammar_that_holds_up_a_step_for_too_long_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "_PATIENCE_SECONDS", 0.0)
    constraint = make_constraint(regex_grammar("[a-c]*"))
    constraint.accept(ids("a"))
    assert constraint.error is not None
    assert "too complex" in constraint.error
    assert allowed(constraint, ids("abc")) == []


def test_accepting_what_no_mask_allowed_is_an_error() -> None:
    constraint = make_constraint(choice_grammar(["yes"]))
    constraint.accept(ids("no"))
    assert constraint.error is not None
    assert "refuses" in constraint.error
