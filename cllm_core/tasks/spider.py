"""Spider (Yu et al. 2018): schemas, questions with their SQL, and the prompt that training and evaluation share.

Reads the files of the data set as they are published: tables.json, train_spider.json, dev.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cllm_core.errors import DataError
from cllm_core.tasks.records import read_json_list

_ANY_COLUMN = -1  # table index of the column "*" that every schema begins with
_NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class Column:
    """A column by its original name; `type` is one of text, number, time, boolean, others."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class ColumnRef:
    """A column by the indices of its table in the schema and of itself in the table."""

    table: int
    column: int


@dataclass(frozen=True, slots=True)
class Table:
    """A table by its original name, columns in the order of tables.json."""

    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """A database without its rows.

    Attributes:
        primary_keys: columns that are (part of) the primary key of their table.
        foreign_keys: (referring column, column referred to).
    """

    db_id: str
    tables: tuple[Table, ...]
    primary_keys: tuple[ColumnRef, ...] = ()
    foreign_keys: tuple[tuple[ColumnRef, ColumnRef], ...] = ()

    def column(self, ref: ColumnRef) -> Column:
        """The column that `ref` names."""
        return self.tables[ref.table].columns[ref.column]


class SpiderExample(msgspec.Struct, frozen=True):
    """A question on a database, and the SQL that answers it."""

    db_id: str
    question: str
    query: str


def format_prompt(schema: Schema, question: str) -> str:
    """The user's message: a line `table(column, column, ...)` per table, an empty line, the question."""
    lines = [f"{table.name}({', '.join(column.name for column in table.columns)})" for table in schema.tables]
    return "\n".join(lines) + "\n\n" + question


def format_answer(query: str) -> str:
    """The SQL alone, runs of blanks made one: the published queries set some tokens apart with two."""
    return " ".join(query.split()).removesuffix(";").rstrip()


def load_schemas(path: Path) -> dict[str, Schema]:
    """The schemas of a tables.json, by db_id.

    Raises:
        DataError: the file cannot be read, or a schema is broken (its db_id is named).
    """
    return {raw.db_id: _schema_of(raw, path) for raw in read_json_list(path, _RawSchema)}


def load_examples(path: Path, schemas: Mapping[str, Schema]) -> list[SpiderExample]:
    """The questions of a train_spider.json or dev.json.

    Args:
        path: of the file.
        schemas: from `load_schemas`; every question must be on one of them.

    Raises:
        DataError: the file cannot be read, a record is broken, or a db_id is not among the schemas.
    """
    examples = read_json_list(path, SpiderExample)
    unknown = list(dict.fromkeys(example.db_id for example in examples if example.db_id not in schemas))
    if unknown:
        index = next(i for i, example in enumerate(examples) if example.db_id == unknown[0])
        named = ", ".join(unknown[:_NUM_NAMED]) + (", ..." if len(unknown) > _NUM_NAMED else "")
        raise DataError(
            f"{path}, record {index}: db_id {unknown[0]!r} is not among the {len(schemas)} schemas "
            f"({len(unknown)} such: {named}); give the tables.json that belongs to these questions"
        )
    return examples


class _RawSchema(msgspec.Struct):
    """One entry of tables.json, as far as it is used. Keys are indices of columns, * included."""

    db_id: str
    table_names_original: list[str]
    column_names_original: list[tuple[int, str]]
    column_types: list[str]
    primary_keys: list[int | list[int]] = []
    foreign_keys: list[tuple[int, int]] = []


def _schema_of(raw: _RawSchema, path: Path) -> Schema:
    try:
        return _build(raw)
    except (IndexError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: schema {raw.db_id!r} names a table or column that it does not have ({error}); correct it"
        ) from error


def _build(raw: _RawSchema) -> Schema:
    columns: list[list[Column]] = [[] for _ in raw.table_names_original]
    refs: dict[int, ColumnRef] = {}
    for index, ((table, name), kind) in enumerate(zip(raw.column_names_original, raw.column_types, strict=True)):
        if table == _ANY_COLUMN:
            continue
        if not 0 <= table < len(columns):
            raise IndexError(f"table index {table} of column {name!r}")
        refs[index] = ColumnRef(table, len(columns[table]))
        columns[table].append(Column(name, kind))
    # later editions of Spider write composite primary keys as lists
    primary = [index for key in raw.primary_keys for index in (key if isinstance(key, list) else [key])]
    return Schema(
        db_id=raw.db_id,
        tables=tuple(Table(name, tuple(own)) for name, own in zip(raw.table_names_original, columns, strict=True)),
        primary_keys=tuple(refs[index] for index in primary),
        foreign_keys=tuple((refs[source], refs[target]) for source, target in raw.foreign_keys),
    )
