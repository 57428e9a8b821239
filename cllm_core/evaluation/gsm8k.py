"""GSM8K answers (Cobbe et al. 2021): the number behind `####`, else the last number of the text."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARK = "####"


def read_number(text: str) -> Decimal | None:
    """The answer that a text gives, None where it holds no number. Thousands separators do not count."""
    marked = _NUMBER.search(text.rpartition(_MARK)[2]) if _MARK in text else None
    numbers = _NUMBER.findall(text)
    found = marked.group() if marked else (numbers[-1] if numbers else None)
    return None if found is None else Decimal(found.replace(",", ""))


def same_number(answer: str, reference: str) -> bool:
    """Whether both texts give the same number, 5 and 5.00 being one."""
    number = read_number(answer)
    return number is not None and number == read_number(reference)
