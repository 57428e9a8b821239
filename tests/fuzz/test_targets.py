"""The laws that `make fuzz` looks for breaks of hold on random bytes, and on those that once broke one."""

import random
from collections.abc import Callable

import pytest

from tests.fuzz.__main__ import NAMES
from tests.fuzz.targets import TARGETS, seeds

FOUND: tuple[tuple[str, bytes], ...] = (
    ("wire_messages", b"\x81\xa4type\xa1\xff"),  # not UTF-8
    ("wire_messages", 5000 * b"\x91" + b"\x01"),  # nested too deep
)
"""Bytes that broke a law once, with the target."""


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_laws_hold_on_random_bytes(target: Callable[[bytes], None]) -> None:
    rng = random.Random(0)
    sound = [data for of_target in seeds().values() for data in of_target]
    for _ in range(1500):
        data = bytearray(rng.choice(sound) if rng.random() < 0.5 else rng.randbytes(rng.randrange(80)))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        target(bytes(data))


def test_every_target_is_fuzzed() -> None:
    assert tuple(TARGETS) == NAMES


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_holds(name: str, data: bytes) -> None:
    TARGETS[name](data)
