"""Laws of the codec: round trips, bytes of single tokens, errors."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_core.errors import InvalidRequest, ModelLoadError
from cllm_core.info import TokenizerBundle
from cllm_core.text.codec import TextCodec
from tests.text import factories


@pytest.mark.parametrize("family", [factories.byte_level, factories.byte_fallback])
@settings(deadline=None)
@given(text=st.text().filter(lambda text: "▁" not in text))
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(family: factories.Family, text: str) -> None:
    codec = factories.make_codec(family())
    token_ids = codec.encode(text, add_special_tokens=False)
    spelled = b"".join(codec.token_bytes(token_id) for token_id in token_ids)
    assert spelled in (text.encode(), b" " + text.encode())


def test_part_of_a_character_has_its_true_bytes_and_a_text_of_its_own() -> None:
    tokenizer = factories.byte_fallback()
    codec = factories.make_codec(tokenizer)
    first, second = (factories.id_of(tokenizer, token) for token in ("<0xE2>", "<0x80>"))
    assert (codec.token_bytes(first), codec.token_bytes(second)) == (b"\xe2", b"\x80")
    assert (codec.token_text(first), codec.token_text(second)) == (r"\xe2", r"\x80")


def test_special_tokens_are_spelled_out_alone_and_left_out_of_texts() -> None:
    tokenizer = factories.byte_level()
    codec = factories.make_codec(tokenizer)
    end = factories.id_of(tokenizer, factories.END)
    assert codec.is_special(end)
    assert codec.token_text(end) == factories.END
    assert codec.decode([*codec.encode("hello", add_special_tokens=False), end]) == "hello"


def test_added_tokens_that_are_not_special_are_literal_text() -> None:
    """The library reads é of an added token as a byte of the GPT-2 alphabet and yields a broken character."""
    tokenizer = factories.byte_level()
    tokenizer.add_tokens(["<né>"])
    codec = factories.make_codec(tokenizer)
    token_ids = codec.encode("<né> <tool>", add_special_tokens=False)
    assert factories.id_of(tokenizer, "<né>") in token_ids
    assert codec.decode(token_ids) == "<né> <tool>"


def test_an_id_beyond_the_tokenizer_stands_for_no_text() -> None:
    codec = factories.make_codec(factories.byte_level())
    assert codec.token_bytes(codec.vocab_size) == b""
    assert codec.decode([codec.vocab_size + 5]) == ""


def test_saved_truncation_and_padding_do_not_touch_prompts() -> None:
    tokenizer = factories.byte_level()
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=100)
    assert len(factories.make_codec(tokenizer).encode("xyzxyz", add_special_tokens=False)) == 6


def test_threads_share_a_codec() -> None:
    codec = factories.make_codec(factories.byte_level())
    texts = [f"hello world {i} 👍" * 20 for i in range(64)]
    with ThreadPoolExecutor(4) as pool:
        token_ids = list(pool.map(lambda text: codec.encode(text, add_special_tokens=False), texts))
        assert list(pool.map(codec.decode, token_ids)) == texts


def test_half_of_a_surrogate_pair_is_the_clients_fault() -> None:
    codec = factories.make_codec(factories.byte_level())
    with pytest.raises(InvalidRequest, match="character 2 is half of a surrogate pair") as caught:
        codec.encode("ab\ud800", add_special_tokens=False, param="prompt")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_a_bundle_without_a_tokenizer_is_a_load_error(text: str) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        TextCodec(TokenizerBundle(tokenizer_json=text))
