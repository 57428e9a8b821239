"""Runs the whole matrix and writes what came of it: tests/matrix.json, the tables of the page on models, the list of
models that need no self-check (cllm_core/models/proven.json). `make models`; it takes some minutes.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import msgspec

from cllm_core.models import proven
from cllm_core.models.proven import Proven, installed_release, read_proven
from tests.matrix import Result, Verdict, run_case
from tests.matrix_cases import Case, all_cases
from tests.matrix_ropes import equal_ropes

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "tests" / "matrix.json", ROOT / "docs" / "reference" / "models.md"
PROVEN = ROOT / "cllm_core" / "models" / proven.FILE_NAME
BEGIN, END = "<!-- matrix: written by `make models` -->\n", "<!-- end of matrix -->\n"
SELF_CHECK = "the self-check finds another result than transformers'"


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of one case.

    Attributes:
        model_type, variant, class_name: of the case.
        result, detail: of the verdict; the detail of equal ones, a tiny number, is left out.
        ropes: of an equal default, the types of rope that are equal too.
    """

    model_type: str
    variant: str
    class_name: str
    result: Result
    detail: str = ""
    ropes: list[str] = []


class Record(msgspec.Struct, frozen=True):
    """Of a whole run."""

    release: tuple[int, int]
    rows: list[Row]


def run_matrix() -> Record:
    """Run every case; prints each."""
    return Record(installed_release(), [run_row(case) for case in all_cases()])


def run_row(case: Case) -> Row:
    """Run one case, and where it is equal and no variant, all ropes."""
    with tempfile.TemporaryDirectory() as folder:
        verdict = run_case(case, Path(folder))
    ropes = equal_ropes(case) if verdict.result == "equal" else []
    sys.stderr.write(f"{verdict.result:9} {case.name}: {verdict.detail} {' '.join(ropes)}\n")
    detail = "" if verdict.result == "equal" else shorten(verdict)
    return Row(case.model_type, case.variant, case.class_name, verdict.result, detail, ropes)


def shorten(verdict: Verdict) -> str:
    """A verdict's detail without the figures and advice that differ from run to run."""
    text = verdict.detail.split("; --skip-self-check")[0]
    if "would be served wrong" in text:
        return SELF_CHECK
    return text if len(text) <= 160 else text[:157] + "..."


def read_record() -> Record:
    """The one in the repository."""
    return msgspec.json.decode(RECORD.read_bytes(), type=Record)


def derive_proven(record: Record, gguf: list[str], oldest: tuple[int, int]) -> Proven:
    """The classes of which no case is wrong, or refused by the self-check alone, with the ropes of all their cases."""
    ropes = {
        name: common_ropes(rows)
        for name, rows in sorted(rows_by_class(record).items())
        if any(row.result == "equal" for row in rows) and not any(is_seen_wrong(row) for row in rows)
    }
    return Proven(oldest, record.release, ropes, gguf)


def rows_by_class(record: Record) -> dict[str, list[Row]]:
    """The cases of each class."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in record.rows:
        found[row.class_name].append(row)
    return found


def common_ropes(rows: list[Row]) -> list[str]:
    """Types of rope with which all equal cases are equal."""
    return sorted(set.intersection(*(set(row.ropes) for row in rows if row.result == "equal")))


def is_seen_wrong(row: Row) -> bool:
    """Whether only a comparison shows that the case cannot be served."""
    return row.result == "wrong" or row.detail == SELF_CHECK


def render(record: Record) -> str:
    """The tables, Markdown."""
    counts = {
        kind: sum(row.result == kind for row in record.rows) for kind in ("equal", "refused", "wrong", "not built")
    }
    release = ".".join(map(str, record.release))
    lines = [
        f"transformers {release}: {counts['equal']} equal, {counts['refused']} refused, {counts['wrong']} wrong; "
        f"{counts['not built']} could not be built tiny.",
        "",
        "| equal | architectures and variants | ropes |",
        "| --- | --- | --- |",
        *_equal_lines(record),
        "",
        "| refused | why |",
        "| --- | --- |",
        *(f"| {_name(row)} | {row.detail} |" for row in record.rows if row.result == "refused"),
        "",
        "| not built | why |",
        "| --- | --- |",
        *(f"| {_name(row)} | {row.detail} |" for row in record.rows if row.result == "not built"),
        "",
    ]
    return "\n".join(line.replace("\n", " ") for line in lines)


def _equal_lines(record: Record) -> list[str]:
    lines = []
    for name, rows in sorted(rows_by_class(record).items()):
        equal = [row for row in rows if row.result == "equal"]
        if equal:
            ropes = ", ".join(filter(None, common_ropes(equal))) or "none"
            lines.append(f"| {name} | {', '.join(map(_name, equal))} | {ropes} |")
    return lines


def _name(row: Row) -> str:
    return f"{row.model_type} ({row.variant})" if row.variant else row.model_type


def page_with(record: Record) -> str:
    """The page on models with these tables."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{render(record)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Run, write, and end with 1 where something is served wrong."""
    record = run_matrix()
    write(record)
    sys.exit(any(row.result == "wrong" for row in record.rows))


def write(record: Record) -> None:
    """All three files, each fact on a line of its own."""
    rows = ",\n".join(msgspec.json.encode(row).decode() for row in record.rows)
    RECORD.write_text(f'{{"release":{list(record.release)},"rows":[\n{rows}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page_with(record), encoding="utf-8")
    known = read_proven()
    listed = derive_proven(record, known.gguf, known.oldest)
    ropes = ",\n".join(f"{json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in listed.ropes.items())
    head = json.dumps({"oldest": listed.oldest, "newest": listed.newest, "gguf": listed.gguf})[:-1]
    PROVEN.write_text(f'{head}, "ropes": {{\n{ropes}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
