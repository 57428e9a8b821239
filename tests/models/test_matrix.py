"""Every architecture that transformers knows is served as it computes it, or refused by name."""

from pathlib import Path

import pytest

from cllm_core.models.proven import installed_release, read_proven
from tests.matrix import run_case
from tests.matrix_cases import Case, all_cases
from tests.matrix_ropes import equal_ropes
from tests.models_page import PAGE, Row, derive_proven, page_with, read_record

RECORDED = {(row.model_type, row.variant): row for row in read_record().rows}


def recorded(case: Case) -> Row | None:
    """What the repository says of a case; None where that run's transformers was another one, or did not know it."""
    is_same = installed_release() == read_record().release
    return RECORDED.get((case.model_type, case.variant)) if is_same else None


def test_nothing_is_served_wrong() -> None:
    assert [row for row in RECORDED.values() if row.result == "wrong"] == []
    assert sum(row.result == "equal" for row in RECORDED.values()) > 150


def test_the_page_and_the_list_are_those_of_the_record() -> None:
    record, listed = read_record(), read_proven()
    assert PAGE.read_text(encoding="utf-8") == page_with(record), "run `make models`"
    assert listed == derive_proven(record, listed.gguf, listed.oldest), "run `make models`"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers comments on tiny sizes in many ways
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_it_is_equal_or_refused(case: Case, tmp_path: Path) -> None:
    verdict, row = run_case(case, tmp_path), recorded(case)
    assert verdict.result != "wrong", verdict.detail
    assert row is None or verdict.result == row.result, verdict.detail


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_rope_on_the_list_is_still_equal(case: Case) -> None:
    row = recorded(case)
    if row is None or row.result != "equal":
        pytest.skip("not on the list")
    assert equal_ropes(case) == row.ropes
