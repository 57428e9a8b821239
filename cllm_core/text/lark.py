"""Pieces of grammars in the Lark dialect of llguidance, for whoever writes one.

There `<[id]>` is a token, `%json` a JSON schema, and a rule that is `[lazy]` ends with the first match. A regex matches
ordinary tokens only: tokens that were added to the vocabulary come where a grammar names them and nowhere else.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from cllm_core.text.json_text import to_json

ANY_TEXT = "(?s:.*)"
SOME_TEXT = "(?s:.+)"
WHITE_SPACE = r"[ \t\r\n]*"

_ESCAPES = str.maketrans({"\n": r"\n", "\r": r"\r", "\t": r"\t"})


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What a grammar has to know of the tokenizer.

    Attributes:
        marks: text -> id of strings with a meaning in the output's format that are tokens of their own.
        visible_ids: other tokens added to the vocabulary that are part of the text.
    """

    marks: Mapping[str, int] = {}
    visible_ids: tuple[int, ...] = ()

    def literal(self, text: str) -> str:
        """The text, its marks as the tokens they are; empty for no text."""
        if not self.marks:
            return to_json(text) if text else ""
        parts = re.split("(" + "|".join(map(re.escape, self.marks)) + ")", text)
        return " ".join(token(self.marks[part]) if part in self.marks else to_json(part) for part in parts if part)

    def leading_mark(self, text: str) -> str | None:
        """The token of its own that the text begins with."""
        return next((mark for mark in self.marks if text.startswith(mark)), None)

    def leading_id(self, text: str) -> int | None:
        """Its id."""
        mark = self.leading_mark(text)
        return None if mark is None else self.marks[mark]


class Excluded(msgspec.Struct, frozen=True):
    """What free text must not begin with, white space aside, as it means something else there.

    Attributes:
        token_id: of the text where it is a token of its own: then its letters are no more than letters.
    """

    text: str
    token_id: int | None = None


def token(*token_ids: int) -> str:
    """Any of these tokens."""
    return f"<[{','.join(map(str, token_ids))}]>"


def regex(pattern: str) -> str:
    """What the pattern matches."""
    return "/" + pattern.replace("/", r"\/") + "/"


def escape(text: str) -> str:
    """A pattern that matches exactly this text."""
    return re.sub(r"\\(?=\s)", "", re.escape(text)).translate(_ESCAPES)


def without(text: str) -> str:
    """A condition on a terminal: the text is nowhere in it."""
    return f"& ~{regex(ANY_TEXT + escape(text) + ANY_TEXT)}"


def text_until(
    name: str, end: str, vocabulary: Vocabulary, *, pattern: str = ANY_TEXT, visible_ids: Sequence[int] = ()
) -> Iterator[str]:
    """Rules, the first of that name, for text and the `end` behind it, which is nowhere in the text.

    Args:
        name: lower case.
        pattern: that the text matches, between visible tokens where there are some.
        visible_ids: added tokens that may be part of the text.
    """
    terminal = name.upper()
    mark = vocabulary.leading_mark(end)
    between = f"({terminal}? {token(*visible_ids)})* " if visible_ids else ""
    if mark is not None:
        yield f"{name}: {between}{terminal}? {vocabulary.literal(end)}"
        yield f"{terminal}: {regex(SOME_TEXT)} & {regex(pattern)} {without(mark)}"
        return
    yield f"{name}: {between}{name}_last"
    yield f"{name}_last[lazy]: {terminal}_LAST"
    yield f"{terminal}_LAST: ({regex(pattern)} {without(end)}) {to_json(end)}"
    if between:
        yield f"{terminal}: {regex(SOME_TEXT)} {without(end)}"


def text_up_to(
    name: str, mark: str, vocabulary: Vocabulary, *, visible_ids: Sequence[int], not_first: Excluded | None = None
) -> Iterator[str]:
    """Rules for free text without a mark, of that name, and for the mark behind it, `{name}_end`.

    Args:
        name: lower case.
        visible_ids: added tokens that may be part of the text.
        not_first: what the text must not begin with.
    """
    terminal = name.upper()
    condition = not_beginning_with(not_first)
    yield from free_text(name, visible_ids, condition=without(mark), not_first=not_first)
    if vocabulary.leading_mark(mark) is not None:
        # The text is without it all the same: its letters must not come as other tokens.
        yield f"{name}_end: {vocabulary.literal(mark)}"
    else:
        yield f"{name}_end[lazy]: {terminal}_END"
        yield f"{terminal}_END: {regex(ANY_TEXT + escape(mark))} {condition}"


def free_text(
    name: str, visible_ids: Sequence[int], *, condition: str = "", first: str = "", not_first: Excluded | None = None
) -> Iterator[str]:
    """Rules, the first of that name, for text of which each part between visible tokens meets a condition.

    Args:
        name: lower case.
        first: a condition on the part up to the first of these tokens alone.
    """
    terminal = name.upper()
    first_ids = [i for i in visible_ids if not_first is None or i != not_first.token_id]
    more = f"({token(*first_ids)} {name}_more)?" if first_ids else ""
    yield f"{name}: {terminal}? {more}"
    yield f"{terminal}: {regex(SOME_TEXT)} {condition} {first} {not_beginning_with(not_first)}"
    if more:
        # Never two of these in a row: a condition on the whole would then hold for neither.
        yield f"{name}_more: {terminal}_MORE? ({token(*visible_ids)} {terminal}_MORE?)*"
        yield f"{terminal}_MORE: {regex(SOME_TEXT)} {condition}"


def not_beginning_with(excluded: Excluded | None) -> str:
    """The condition on a terminal, empty where there is none."""
    if excluded is None or excluded.token_id is not None:
        return ""
    return f"& ~{regex(WHITE_SPACE + escape(excluded.text) + ANY_TEXT)}"
