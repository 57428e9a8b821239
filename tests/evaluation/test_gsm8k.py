"""Reading the number out of an answer."""

from decimal import Decimal

import pytest

from cllm_core.evaluation.gsm8k import read_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8*1.5=<<8*1.5=12>>12\n#### 10", "10"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.50 dollars, not 7", "-3.50"),
        ("#### $18.", "18"),
        ("First 3, then 4, so 12.", "12"),
        ("It costs $1,000.", "1000"),
        ("5 + 6 = 11\n#### eleven", "11"),
        ("half is .5", ".5"),
    ],
)
def test_the_marked_number_wins_else_the_last(text: str, number: str) -> None:
    assert read_number(text) == Decimal(number)


def test_a_text_without_a_number_has_no_answer_and_is_wrong() -> None:
    assert read_number("I do not know.") is None
    assert not same_number("I do not know.", "#### 3")


def test_equal_numbers_are_equal_however_written() -> None:
    assert same_number("So it is 1,200.00", "#### 1200")
    assert not same_number("So it is 12", "#### 1200")
