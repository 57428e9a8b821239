"""Spider examples in another style and order."""

import random
from pathlib import Path

import pytest

from cllm_core.tasks.renaming import STYLES, name_mapping, rename_examples, rename_query, rewrite_schema
from cllm_core.tasks.spider import Schema, SpiderExample, load_schemas
from tests.tasks.factories import write_spider


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    return load_schemas(write_spider(tmp_path)[1])["school"]


def test_names_are_renamed_and_quoted_text_is_not() -> None:
    mapping = {"has_pet": "HasPet", "pet_name": "PetName"}
    query = "SELECT T1.pet_name FROM has_pet AS T1 WHERE pet_name = 'pet_name' AND x = \"has_pet\""
    expected = "SELECT T1.PetName FROM HasPet AS T1 WHERE PetName = 'pet_name' AND x = \"has_pet\""
    assert rename_query(query, mapping) == expected


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_case_and_separators_only(schema: Schema, style: object) -> None:
    mapping = name_mapping(schema, style)  # type: ignore[arg-type]
    assert "last name" not in mapping or mapping["last name"] == "Last Name"
    for old, new in mapping.items():
        assert old.replace("_", "") == new.lower().replace("_", "")


def test_names_that_would_collide_keep_apart() -> None:
    schema = Schema("a", ())
    assert name_mapping(schema, STYLES[0]) == {}


def test_keys_follow_their_columns(schema: Schema) -> None:
    rewritten = rewrite_schema(schema, {}, random.Random(3))
    source, target = rewritten.foreign_keys[0]
    assert rewritten.tables[source.table].name == "Has_Pet"
    assert rewritten.tables[target.table].name == "Student"
    assert rewritten.column(source).name == rewritten.column(target).name == "StuID"


def test_copies_of_a_database_agree_and_seeds_repeat(schema: Schema) -> None:
    pairs = [(schema, SpiderExample("school", "?", "SELECT pet_name FROM Has_Pet"))] * 2
    renamed = rename_examples(pairs, copies=3, seed=1)
    assert len(renamed) == 6
    assert renamed == rename_examples(pairs, copies=3, seed=1)
    assert renamed[0] == renamed[1]
    assert renamed != rename_examples(pairs, copies=3, seed=2)
