"""Small Spider files."""

import json
from pathlib import Path

SCHOOL = {
    "db_id": "school",
    "table_names_original": ["Student", "Has_Pet"],
    "column_names_original": [[-1, "*"], [0, "StuID"], [0, "Last Name"], [1, "StuID"], [1, "pet_name"]],
    "column_types": ["text", "number", "text", "number", "text"],
    "primary_keys": [1],
    "foreign_keys": [[3, 1]],
}
QUESTION = {"db_id": "school", "question": "How many students?", "query": "SELECT count(*)  FROM Student ;"}


def write_spider(folder: Path, *, questions: int = 1, db_id: str = "school") -> tuple[Path, Path]:
    """Write train.json and tables.json; return their paths."""
    records = [QUESTION | {"db_id": db_id, "question": f"How many students, {i}?"} for i in range(questions)]
    return write_json(folder / "train.json", records), write_json(folder / "tables.json", [SCHOOL])


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path
