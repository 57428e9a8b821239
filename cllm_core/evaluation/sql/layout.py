"""Which columns of a schema depend on each other, for the rows that one query will be run on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cllm_core.evaluation.sql.query_text import QueryHints
from cllm_core.tasks.spider import ColumnRef, Schema

_NUMERIC_TYPES = ("number", "boolean")


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys, references and types of the columns.

    Attributes:
        schema: of the tables.
        parents: by referring column, the columns it refers to: declared foreign keys, and joins of the query between
            columns that no foreign key ties.
        unique: columns without duplicates: those referred to, and each primary key of a single column that is not
            itself a reference. One that is, is mostly part of a composite key, of which Spider names one column only.
        domains: by column, all columns that references tie to it, itself included.
    """

    schema: Schema
    parents: Mapping[ColumnRef, frozenset[ColumnRef]]
    unique: frozenset[ColumnRef]
    domains: Mapping[ColumnRef, frozenset[ColumnRef]]

    def is_numeric(self, ref: ColumnRef) -> bool:
        """Whether the column stores numbers. Tied columns are of one type, that of the first key among them."""
        return self.type_of(ref) in _NUMERIC_TYPES

    def type_of(self, ref: ColumnRef) -> str:
        """Spider's type of the column, or of the key that it is tied to."""
        lead = min(self.domains[ref], key=lambda other: (other not in self.unique, other.table, other.column))
        return self.schema.column(lead).type

    def references(self) -> Iterator[tuple[ColumnRef, ColumnRef]]:
        """(Referring column, column referred to)."""
        return ((child, parent) for child, parents in self.parents.items() for parent in sorted(parents, key=_place))


def build_layout(schema: Schema, hints: QueryHints) -> Layout:
    """The layout of a schema for a query with these hints."""
    domains = {ref: frozenset([ref]) for ref in _columns(schema)}
    parents: dict[ColumnRef, frozenset[ColumnRef]] = {}

    def refer(child: ColumnRef, parent: ColumnRef) -> None:
        parents[child] = parents.get(child, frozenset()) | {parent}
        tied = domains[child] | domains[parent]
        domains.update(dict.fromkeys(tied, tied))

    for child, parent in schema.foreign_keys:
        if child != parent:
            refer(child, parent)
    for left, right in hints.joins:
        if left not in domains[right]:
            refer(*((left, right) if right in schema.primary_keys else (right, left)))
    referred = frozenset[ColumnRef]().union(*parents.values())
    return Layout(
        schema=schema,
        parents=parents,
        unique=referred | {ref for ref in _single_primary_keys(schema) if ref not in parents},
        domains=domains,
    )


def _columns(schema: Schema) -> Iterator[ColumnRef]:
    for index, table in enumerate(schema.tables):
        yield from (ColumnRef(index, column) for column in range(len(table.columns)))


def _single_primary_keys(schema: Schema) -> Iterator[ColumnRef]:
    tables = [ref.table for ref in schema.primary_keys]
    return (ref for ref in schema.primary_keys if tables.count(ref.table) == 1)


def _place(ref: ColumnRef) -> tuple[int, int]:
    return ref.table, ref.column
