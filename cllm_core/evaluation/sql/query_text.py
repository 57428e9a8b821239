"""What the text of a query tells without parsing it: its normal form, its literals, the columns it joins.

Works on tokens alone, so it takes any dialect and any wrong SQL. A literal given to the wrong column does no harm: it
is one more value in the generated rows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cllm_core.tasks.spider import ColumnRef, Schema

Literal = int | float | str

_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | \d+(?:\.\d+)? | \w+ | <> | != | <= | >= | == | \|\| | \S""",
    re.VERBOSE,
)
_SYNONYMS = {"<>": "!=", "==": "="}
_BEYOND = {">": 1, "<": -1}  # to what satisfies a comparison that the literal itself does not
_MAX_INT_DIGITS = 18  # SQLite's integers have 64 bits
_WILDCARD_WORD = " amber "


@dataclass(frozen=True, slots=True)
class QueryHints:
    """What rows must hold for a query to find something.

    Attributes:
        literals: values by the lower-case name of the column that they are compared with.
        joins: pairs of columns that the query sets equal.
    """

    literals: Mapping[str, tuple[Literal, ...]]
    joins: tuple[tuple[ColumnRef, ColumnRef], ...]


def normalise(sql: str) -> str:
    """The query with case (outside quotes), spacing, kind of quotes, synonyms and the closing semicolon made one."""
    tokens = [_SYNONYMS.get(token, token) for token in tokenise(sql)]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    return " ".join(f"'{_unquote(token)}'" if token[0] in "'\"" else _unquote(token).lower() for token in tokens)


def tokenise(sql: str) -> list[str]:
    """The tokens of a query; quoted ones keep their quotes."""
    return _TOKEN.findall(sql)


def is_ordered(sql: str) -> bool:
    """Whether the query itself, not a query inside it, orders its result."""
    depth = 0
    for token in tokenise(sql.lower()):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == "order" and depth == 0:
            return True
    return False


def break_ties(sql: str, num_columns: int, *, descending: bool) -> str:
    """The query whose ORDER BYs, where their keys are equal, go on by the columns of the result, all up or all down.

    Args:
        sql: the query.
        num_columns: of its result. Of a query inside it only the first column is taken: how many it has is not known.
        descending: the direction.
    """
    columns = [f", {column}{' DESC' if descending else ''}" for column in range(1, num_columns + 1)]
    text, start = "", 0
    is_ordering = [False]  # the query, and what is in the parentheses that are open
    for match in _TOKEN.finditer(f"{sql};"):
        token = match.group().lower()
        if is_ordering[-1] and token in ("limit", ")", ";"):
            text += sql[start : match.start()] + "".join(columns if len(is_ordering) == 1 else columns[:1]) + " "
            start, is_ordering[-1] = match.start(), False
        if token == "(":
            is_ordering.append(False)
        elif token == ")":
            is_ordering.pop()
        elif token == "order":
            is_ordering[-1] = True
    return text + sql[start:]


def read_hints(sql: str, schema: Schema) -> QueryHints:
    """Literals and joins of a query on this schema."""
    reader = _Reader(tokenise(sql), schema)
    return QueryHints(literals=reader.literals(), joins=tuple(reader.joins()))


class _Reader:
    """Walks the tokens of one query with the names of the schema at hand."""

    def __init__(self, tokens: Sequence[str], schema: Schema) -> None:
        self._tokens = tokens
        self._words = [_unquote(token).lower() for token in tokens]
        self._tables = {table.name.lower(): index for index, table in enumerate(schema.tables)}
        self._columns = [{column.name.lower(): i for i, column in enumerate(table.columns)} for table in schema.tables]
        self._names = {name for columns in self._columns for name in columns}
        self._aliases = self._find_aliases()

    def literals(self) -> dict[str, tuple[Literal, ...]]:
        found: dict[str, list[Literal]] = {}
        column = ""
        for index, word in enumerate(self._words):
            if self._is_column(index):
                column = word
            elif column and self._is_literal(index):
                found.setdefault(column, []).extend(self._values(index))
        return {name: tuple(dict.fromkeys(values)) for name, values in found.items()}

    def joins(self) -> Iterator[tuple[ColumnRef, ColumnRef]]:
        """`a = b` and `a [NOT] IN (SELECT b`."""
        for index in range(len(self._words)):
            left = self._column_ending_at(index)
            if left is None:
                continue
            right = self._column_starting_at(self._joined_at(index + 1))
            if right is not None and right != left:
                yield left, right

    def _joined_at(self, index: int) -> int:
        """Where the other side of a comparison that starts at `index` begins; past the end where there is none."""
        words = [word for word in self._words[index : index + 5] if word not in ("not", "distinct")]
        skipped = len(self._words[index : index + 5]) - len(words)
        if words[:1] in (["="], ["=="]):
            return index + 1
        if words[:3] == ["in", "(", "select"]:
            return index + 3 + skipped
        return len(self._words)

    def _find_aliases(self) -> dict[str, int]:
        aliases = {}
        for index, word in enumerate(self._words):
            if word in self._tables:
                aliases[word] = self._tables[word]
                if self._words[index + 1 : index + 2] == ["as"] and index + 2 < len(self._words):
                    aliases[self._words[index + 2]] = self._tables[word]
        return aliases

    def _is_column(self, index: int) -> bool:
        return self._words[index] in self._names and not self._tokens[index].startswith("'")

    def _is_literal(self, index: int) -> bool:
        token = self._tokens[index]
        if token[0].isdigit():
            return self._words[index - 1] not in ("limit", "offset")
        if token.startswith('"'):  # SQLite takes an unknown "name" for a string, and Spider relies on it
            return self._words[index] not in self._names | self._aliases.keys()
        return token.startswith("'")

    def _values(self, index: int) -> list[Literal]:
        token = self._tokens[index]
        if not token[0].isdigit():
            text = _unquote(token)
            return _matching_texts(text) if self._words[index - 1] == "like" else [text]
        number = int(token) if token.isdecimal() and len(token) <= _MAX_INT_DIGITS else float(token)
        before = index - 1
        if self._words[before] == "-" and not self._is_column(before - 1):
            number, before = -number, before - 1
        return [number + _BEYOND.get(self._words[before], 0)]

    def _column_ending_at(self, index: int) -> ColumnRef | None:
        if not self._is_column(index):
            return None
        qualifier = self._words[index - 2] if index >= 2 and self._words[index - 1] == "." else None
        return self._resolve(qualifier, self._words[index])

    def _column_starting_at(self, index: int) -> ColumnRef | None:
        end = index + 2 if self._words[index + 1 : index + 2] == ["."] else index
        return self._column_ending_at(end) if end < len(self._words) else None

    def _resolve(self, qualifier: str | None, name: str) -> ColumnRef | None:
        """The column of this name: in the table of the qualifier, else in the first table of the query that has it."""
        tables = list(self._aliases.values()) if qualifier is None else [self._aliases.get(qualifier)]
        for table in tables:
            if table is not None and name in self._columns[table]:
                return ColumnRef(table, self._columns[table][name])
        return None


def _matching_texts(pattern: str) -> list[Literal]:
    """Texts that a LIKE pattern matches, with nothing and with a word in place of each %."""
    plain = pattern.replace("_", "x")
    return [plain.replace("%", ""), plain.replace("%", _WILDCARD_WORD)]


def _is_quoted(token: str) -> bool:
    return len(token) > 1 and token[0] in "'\"`"


def _unquote(token: str) -> str:
    if not _is_quoted(token):
        return token
    quote = token[0]
    return token[1:-1].replace(quote * 2, quote)
