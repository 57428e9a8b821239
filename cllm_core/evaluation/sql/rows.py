"""Deterministic random rows: keys unique, references met, the literals of a query among the values.

Columns that references tie together share one list of distinct values, their *domain*. A unique column of a table with
R rows holds the first R of them in some order; a column that refers to it draws from those R. So every reference is
met whatever the order in which columns are filled, and cycles of references need no special care.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cllm_core.evaluation.sql.layout import Layout
from cllm_core.evaluation.sql.query_text import Literal
from cllm_core.tasks.spider import ColumnRef

Row = tuple[Literal, ...]

_WORDS = (
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "falcon",
    "garnet",
    "harbor",
    "indigo",
    "jasper",
    "kestrel",
    "linden",
    "maple",
    "nectar",
    "onyx",
    "pearl",
    "quartz",
    "raven",
    "silver",
    "topaz",
    "umber",
    "violet",
    "willow",
    "xenon",
    "yarrow",
    "zephyr",
)
_NUMBER = re.compile(r"-?\d{1,15}(\.\d+)?")
_POOL_SIZE = 12  # distinct values of a column that is no key: few enough to repeat, so that groups have members
_WITNESS_SHARE = 0.35  # of rows, in which every column that the query compares holds one of its literals
_SKEW = 2  # exponent that makes early values of a domain frequent, so that some groups are large


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What the values of one column are drawn from."""

    choices: tuple[Literal, ...]
    literals: tuple[Literal, ...]
    is_unique: bool = False
    is_skewed: bool = False


def generate_rows(
    layout: Layout, literals: Mapping[str, Sequence[Literal]], *, num_rows: int, seed: int
) -> list[list[Row]]:
    """Rows of every table, in the order of the schema.

    Args:
        layout: of the columns.
        literals: values that columns of these lower-case names must hold too.
        num_rows: of the largest tables; tables that others refer to get about half as many, so that groups form.
        seed: the same seed and arguments give the same rows.
    """
    return list(_Generator(layout, literals, num_rows, random.Random(seed)).tables())


class _Generator:
    """Draws the rows of one database."""

    def __init__(
        self, layout: Layout, literals: Mapping[str, Sequence[Literal]], num_rows: int, rng: random.Random
    ) -> None:
        self._layout = layout
        self._literals = literals
        self._rng = rng
        self._counts = _row_counts(layout, num_rows, rng)
        # dict.fromkeys keeps the order of the schema: a set has none, and the rows must not depend on it
        self._domains = {domain: self._domain_values(domain) for domain in dict.fromkeys(layout.domains.values())}

    def tables(self) -> Iterator[list[Row]]:
        for index, table in enumerate(self._layout.schema.tables):
            recipes = [self._recipe(ColumnRef(index, position)) for position in range(len(table.columns))]
            yield _fill(recipes, self._counts[index], self._rng)

    def _wanted(self, ref: ColumnRef) -> list[Literal]:
        """Literals that the query compares the column with, as the column stores them."""
        is_numeric = self._layout.is_numeric(ref)
        name = self._layout.schema.column(ref).name.lower()
        return [_coerce(value, is_numeric) for value in self._literals.get(name, ())]

    def _domain_values(self, domain: frozenset[ColumnRef]) -> list[Literal]:
        """Distinct values, literals first; as many as the largest table has rows where one of the columns is a key."""
        members = sorted(domain, key=lambda ref: (ref.table, ref.column))
        lead = members[0]
        wanted = [value for ref in members for value in self._wanted(ref)]
        self._rng.shuffle(wanted)
        if len(members) > 1 or lead in self._layout.unique:
            drawn = _key_values(self._layout.is_numeric(lead), max(self._counts), self._rng)
        else:
            draw = _value_source(self._layout.type_of(lead), self._layout.schema.column(lead).name, self._rng)
            drawn = [draw() for _ in range(_POOL_SIZE)]
        return list(dict.fromkeys([*wanted, *drawn]))

    def _recipe(self, ref: ColumnRef) -> _Recipe:
        values, wanted = self._domains[self._layout.domains[ref]], self._wanted(ref)
        parents, is_unique = self._layout.parents.get(ref, frozenset()), ref in self._layout.unique
        if not parents and not is_unique:
            nearby = [value for literal in wanted for value in _neighbours(literal)]
            return _Recipe((*values, *nearby), tuple(wanted))
        limit = min(self._counts[other.table] for other in (parents | {ref} if is_unique else parents))
        choices = values[:limit]
        if is_unique:
            self._rng.shuffle(choices)
        found = tuple(value for value in wanted if value in choices)
        return _Recipe(tuple(choices), found, is_unique=is_unique, is_skewed=True)


def _row_counts(layout: Layout, num_rows: int, rng: random.Random) -> list[int]:
    """Rows per table; no unique column that refers to another has more rows than that."""
    referred = {parent.table for _, parent in layout.references()}
    counts = []
    for index in range(len(layout.schema.tables)):
        most = max(2, num_rows // 2) if index in referred else num_rows
        counts.append(rng.randint(max(2, most // 2), most))
    limits = [(child.table, parent.table) for child, parent in layout.references() if child in layout.unique]
    for _ in counts:  # a chain of such references is at most as long as there are tables
        for child, parent in limits:
            counts[child] = min(counts[child], counts[parent])
    return counts


def _key_values(is_numeric: bool, count: int, rng: random.Random) -> list[Literal]:
    first = rng.randint(1, 1000)
    numbers = range(first, first + count)
    return list(numbers) if is_numeric else [f"{rng.choice(_WORDS)} {number}" for number in numbers]


def _fill(recipes: Sequence[_Recipe], num_rows: int, rng: random.Random) -> list[Row]:
    rows = []
    for index in range(num_rows):
        is_witness = rng.random() < _WITNESS_SHARE
        rows.append(tuple(_choose(recipe, index, is_witness, rng) for recipe in recipes))
    return rows


def _choose(recipe: _Recipe, index: int, is_witness: bool, rng: random.Random) -> Literal:
    if recipe.is_unique:
        return recipe.choices[index]
    if is_witness and recipe.literals:
        return rng.choice(recipe.literals)
    if recipe.is_skewed:
        return recipe.choices[int(rng.random() ** _SKEW * len(recipe.choices))]
    return rng.choice(recipe.choices)


def _value_source(type_name: str, column_name: str, rng: random.Random) -> Callable[[], Literal]:
    """Draws values that look like those of a column of this type and name."""
    match type_name:
        case "number" if "year" in column_name.lower():
            return lambda: rng.randint(1950, 2025)
        case "number":
            high = rng.choice((10, 100, 10_000))
            return rng.choice((lambda: rng.randint(1, high), lambda: round(rng.uniform(0, high), 1)))
        case "boolean":
            return lambda: rng.randint(0, 1)
        case "time":
            return lambda: f"{rng.randint(1990, 2024)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        case _:
            # some digits: many text columns of Spider hold numbers, and are summed or compared as such
            return lambda: rng.choice((*_WORDS, str(rng.randint(1, 300)), str(rng.randint(1, 300))))


def _neighbours(literal: Literal) -> tuple[Literal, ...]:
    """The literal and what lies just beside it, which tells > from >= and = from LIKE."""
    if isinstance(literal, int | float):
        return (literal - 1, literal, literal + 1)
    return (literal, f"{literal} II")


def _coerce(literal: Literal, is_numeric: bool) -> Literal:
    """The literal as SQLite would store it in the column, so that equal values are seen to be equal here too."""
    if not is_numeric:
        return literal if isinstance(literal, str) else str(literal)
    if isinstance(literal, str) and _NUMBER.fullmatch(literal):
        return float(literal) if "." in literal else int(literal)
    return literal
