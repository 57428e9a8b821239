"""More Spider examples out of the same ones: tables and columns written in another style and order.

A model that has seen few databases learns their names and places by heart; rewritten copies make it read the schema.
Only case, separators and order change, so the question keeps its meaning and the query its result.
"""

import random
import re
from collections.abc import Callable, Sequence

from cllm_core.tasks.spider import Column, ColumnRef, Schema, SpiderExample, Table

# Quoted text is copied as it is; words are renamed where they name a table or column.
_PIECES = re.compile(r"""('[^']*'|"[^"]*"|`[^`]*`)|([A-Za-z_][A-Za-z0-9_]*)""")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

Style = Callable[[Sequence[str]], str]

STYLES: tuple[Style, ...] = (
    "_".join,
    lambda parts: "_".join(parts).upper(),
    lambda parts: "_".join(part.capitalize() for part in parts),
    lambda parts: "".join(part.capitalize() for part in parts),
    lambda parts: parts[0] + "".join(part.capitalize() for part in parts[1:]),
    "".join,
)


def rename_examples(
    pairs: Sequence[tuple[Schema, SpiderExample]], *, copies: int, seed: int
) -> list[tuple[Schema, SpiderExample]]:
    """Rewritten copies of examples; a copy of a database looks the same in all its examples.

    Args:
        pairs: schema and example; schemas are equal where the db_id is.
        copies: rewritten versions of each database.
        seed: of styles and orders.
    """
    schemas = {schema.db_id: schema for schema, _ in pairs}
    renamed: list[tuple[Schema, SpiderExample]] = []
    for copy in range(copies):
        rngs = {db_id: random.Random(f"{seed}/{copy}/{db_id}") for db_id in schemas}
        mappings = {db_id: name_mapping(schema, rngs[db_id].choice(STYLES)) for db_id, schema in schemas.items()}
        versions = {db_id: rewrite_schema(schema, mappings[db_id], rngs[db_id]) for db_id, schema in schemas.items()}
        renamed += [
            (
                versions[schema.db_id],
                SpiderExample(schema.db_id, example.question, rename_query(example.query, mappings[schema.db_id])),
            )
            for schema, example in pairs
        ]
    return renamed


def name_mapping(schema: Schema, style: Style) -> dict[str, str]:
    """From each name of the schema in lower case to the name in the style; those that would collide are left out."""
    names = {table.name for table in schema.tables} | {c.name for table in schema.tables for c in table.columns}
    mapping: dict[str, str] = {}
    taken = {name.lower() for name in names}
    for name in sorted(names):
        parts = _PARTS.findall(name) if _NAME.fullmatch(name) else []  # others are quoted in queries
        new = style([part.lower() for part in parts]) if parts else name
        if _NAME.fullmatch(new) and (new.lower() == name.lower() or new.lower() not in taken):
            mapping[name.lower()] = new
            taken.add(new.lower())
    return mapping


def rewrite_schema(schema: Schema, mapping: dict[str, str], rng: random.Random) -> Schema:
    """The schema with its names mapped, and tables and columns in another order."""
    table_order = rng.sample(range(len(schema.tables)), len(schema.tables))
    column_orders = [rng.sample(range(len(table.columns)), len(table.columns)) for table in schema.tables]
    places = {
        ColumnRef(table, column): ColumnRef(new_table, new_column)
        for new_table, table in enumerate(table_order)
        for new_column, column in enumerate(column_orders[table])
    }
    tables = tuple(_rewrite_table(schema.tables[table], column_orders[table], mapping) for table in table_order)
    return Schema(
        schema.db_id,
        tables,
        tuple(places[ref] for ref in schema.primary_keys),
        tuple((places[source], places[target]) for source, target in schema.foreign_keys),
    )


def rename_query(query: str, mapping: dict[str, str]) -> str:
    """The query with every table and column renamed; quoted text stays."""

    def replace(match: re.Match[str]) -> str:
        word: str | None = match.group(2)
        return match.group(0) if word is None else mapping.get(word.lower(), word)

    return _PIECES.sub(replace, query)


def _rewrite_table(table: Table, order: Sequence[int], mapping: dict[str, str]) -> Table:
    columns = (table.columns[index] for index in order)
    return Table(
        mapping.get(table.name.lower(), table.name),
        tuple(Column(mapping.get(column.name.lower(), column.name), column.type) for column in columns),
    )
