"""Laws of stop strings, against their naive definition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_core.text.stop import StopMatcher
from tests.text.strategies import cut, cuts

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)
TEXTS = st.text("abc", max_size=30)


def naive(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Look for stop strings after each character, as a text that grows by one character a step is looked at."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=500)
@given(text=TEXTS, stops=STOPS, at=cuts(30))
def test_text_ends_where_the_naive_definition_says_whatever_the_pieces(
    text: str, stops: tuple[str, ...], at: list[int]
) -> None:
    matcher = StopMatcher(stops)
    given_away = "".join(matcher.push(piece) for piece in cut(text, at)) + matcher.flush()
    assert (given_away, matcher.matched) == naive(text, stops)


@settings(deadline=None, max_examples=500)
@given(text=TEXTS, stops=STOPS, at=cuts(30))
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: tuple[str, ...], at: list[int]) -> None:
    matcher = StopMatcher(stops)
    seen = given_away = ""
    for piece in cut(text, at):
        seen += piece
        given_away += matcher.push(piece)
        if matcher.finished:
            break
        held = seen[len(given_away) :]
        beginnings = [seen[i:] for i in range(len(seen)) if any(stop.startswith(seen[i:]) for stop in stops)]
        assert held == max(beginnings, key=len, default="")


def test_nothing_passes_after_a_stop_string() -> None:
    matcher = StopMatcher(("\n\n",))
    assert [matcher.push(piece) for piece in ("a\n", "\nb", "c")] == ["a", "", ""]
    assert matcher.finished
    assert matcher.flush() == ""


def test_a_stop_string_inside_another_wins_as_it_ends_first() -> None:
    matcher = StopMatcher(("abcd", "bc"))
    assert matcher.push("xabcd") == "xa"
    assert matcher.matched == "bc"


def test_text_held_back_is_given_where_the_text_ends() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.push("no ST") == "no "
    assert matcher.flush() == "ST"
    assert not matcher.finished
