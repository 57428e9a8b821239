"""A small made-up schema in the form of tables.json, and what the tests of SQL need on it."""

from cllm_core.tasks.spider import Column, ColumnRef, Schema, Table


def music_schema() -> Schema:
    """singer 1-n song, singer n-m concert through plays, whose key has two columns; a singer may have a mentor."""
    number, text = "number", "text"
    return Schema(
        db_id="music",
        tables=(
            Table(
                "singer", (Column("id", number), Column("name", text), Column("age", number), Column("mentor", number))
            ),
            Table("song", (Column("id", number), Column("title", text), Column("singer_id", text))),
            Table("concert", (Column("id", number), Column("held on", "time"), Column("open_air", "boolean"))),
            Table("plays", (Column("singer_id", number), Column("concert_id", number))),
        ),
        primary_keys=(ColumnRef(0, 0), ColumnRef(1, 0), ColumnRef(2, 0), ColumnRef(3, 0)),
        foreign_keys=(
            (ColumnRef(0, 3), ColumnRef(0, 0)),
            (ColumnRef(1, 2), ColumnRef(0, 0)),
            (ColumnRef(3, 0), ColumnRef(0, 0)),
            (ColumnRef(3, 1), ColumnRef(2, 0)),
        ),
    )
