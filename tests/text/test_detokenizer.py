"""Laws of incremental detokenisation, for each decoder family, against the `tokenizers` library."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text import factories
from tests.text.strategies import cut, cuts

FAMILIES: list[factories.Family] = [
    factories.byte_level,
    factories.byte_fallback,
    factories.metaspace,
    factories.word_piece,
    factories.word_level,
]
TOKEN_IDS = st.lists(st.integers(0, 275), max_size=40).map(tuple)
SMALL_TOKEN_IDS = st.lists(st.integers(0, 12), max_size=20).map(tuple)
LAW = settings(deadline=None, max_examples=200)


@LAW
@pytest.mark.parametrize("family", FAMILIES)
@given(token_ids=TOKEN_IDS | SMALL_TOKEN_IDS, at=cuts(40))
def test_chunking_does_not_change_the_text(family: factories.Family, token_ids: tuple[int, ...], at: list[int]) -> None:
    codec = factories.make_codec(family())
    detokenizer = codec.detokenizer()
    assert "".join(detokenizer.push(chunk) for chunk in cut(token_ids, at)) == codec.decode(token_ids)


@LAW
@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not factories.byte_fallback])
@given(token_ids=TOKEN_IDS | SMALL_TOKEN_IDS)
def test_any_tokens_decode_as_the_tokenizers_library_does_up_to_an_incomplete_last_character(
    family: factories.Family, token_ids: tuple[int, ...]
) -> None:
    tokenizer = family()
    text = factories.make_codec(tokenizer).decode(token_ids)
    expected = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert expected in (text, text + "\ufffd")


@LAW
@given(token_ids=TOKEN_IDS | st.lists(st.integers(33, 126) | st.integers(257, 266), max_size=20).map(tuple))
def test_byte_fallback_tokens_that_form_characters_decode_as_the_tokenizers_library_does(
    token_ids: tuple[int, ...],
) -> None:
    tokenizer = factories.byte_fallback()
    expected = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    if "\ufffd" not in expected:
        assert factories.make_codec(tokenizer).decode(token_ids) == expected


@pytest.mark.parametrize("family", [factories.byte_level, factories.byte_fallback])
@LAW
@given(text=st.text().filter(lambda text: "▁" not in text), at=cuts(60))
def test_text_survives_encoding_and_streaming(family: factories.Family, text: str, at: list[int]) -> None:
    codec = factories.make_codec(family())
    detokenizer = codec.detokenizer()
    token_ids = tuple(codec.encode(text, add_special_tokens=False))
    assert "".join(detokenizer.push(chunk) for chunk in cut(token_ids, at)) == text


@pytest.mark.parametrize("family", [factories.byte_level, factories.byte_fallback])
def test_a_character_comes_with_its_last_byte_and_not_broken_before(family: factories.Family) -> None:
    codec = factories.make_codec(family())
    detokenizer = codec.detokenizer()
    pieces = [detokenizer.push((token_id,)) for token_id in codec.encode("👍ß", add_special_tokens=False)]
    assert [piece for piece in pieces if piece] in (["👍", "ß"], ["", "👍", "ß"])
    assert pieces[-1] == "ß"


@pytest.mark.parametrize("family", [factories.byte_level, factories.byte_fallback])
def test_an_incomplete_last_character_is_left_out_and_whole_ones_beside_it_stay(family: factories.Family) -> None:
    codec = factories.make_codec(family())
    token_ids = codec.encode("👍👍", add_special_tokens=False)
    assert codec.decode(token_ids[:-1]) == "👍"


def test_whole_characters_beside_broken_byte_fallback_tokens_stay() -> None:
    """The library turns every byte of such a run into U+FFFD, the good characters too."""
    tokenizer = factories.byte_fallback()
    token_ids = [factories.id_of(tokenizer, token) for token in ("<0x41>", "<0xE2>", "a", "<0x0A>")]
    assert factories.make_codec(tokenizer).decode(token_ids) == "A\ufffda\n"


@pytest.mark.parametrize("family", [factories.byte_fallback, factories.metaspace])
def test_a_leading_space_stays_only_where_other_text_stands_before(family: factories.Family) -> None:
    tokenizer = family()
    codec = factories.make_codec(tokenizer)
    token_ids = [factories.id_of(tokenizer, token) for token in (factories.BOS, "▁a", "▁a")]
    assert codec.detokenizer().push(token_ids) == "a a"
    assert codec.detokenizer(continues_text=True).push(token_ids) == " a a"


def test_cost_per_token_does_not_grow_where_no_character_ever_completes() -> None:
    """DecodeStream decodes the whole open run for each token: minutes for what takes milliseconds here."""
    tokenizer = factories.byte_level()
    detokenizer = factories.make_codec(tokenizer).detokenizer()
    continuation_byte = factories.id_of(tokenizer, "Ģ")
    start = time.perf_counter()
    text = "".join(detokenizer.push((continuation_byte,)) for _ in range(50_000))
    assert text == "\ufffd" * 50_000
    assert time.perf_counter() - start < 10
