"""Prompts of a comparison: from JSON lines, or questions of Spider in the form that cllm-sql was trained on."""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cllm_core.tasks.records import read_json_lines
from cllm_core.tasks.spider import format_prompt, load_examples, load_schemas

_SEED = 0


class _PromptLine(msgspec.Struct):
    prompt: str


def read_prompts(path: Path) -> list[str]:
    """The "prompt" of each line, as user's messages.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a line is broken.
    """
    return [line.prompt for line in read_json_lines(path, _PromptLine)]


def spider_prompts(questions: Path, tables: Path) -> list[str]:
    """The questions of a dev.json with their schemas, shuffled: the file goes database by database.

    Raises:
        DataError: a file cannot be read, or they do not belong together.
    """
    schemas = load_schemas(tables)
    prompts = [format_prompt(schemas[one.db_id], one.question) for one in load_examples(questions, schemas)]
    random.Random(_SEED).shuffle(prompts)
    return prompts


class PromptSupply:
    """Hands out prompts in order, from the start again when all are used: no server has seen one before, until then.

    Servers keep what they computed of a prompt; a second look at the same one would measure their cache.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = list(prompts)
        self._num_taken = 0

    @property
    def num_prompts(self) -> int:
        """All of them, used or not."""
        return len(self._prompts)

    @property
    def repeats(self) -> bool:
        """Whether some prompt was handed out twice."""
        return self._num_taken > len(self._prompts)

    def take(self, count: int) -> list[str]:
        """The next `count` prompts."""
        taken = [self._prompts[(self._num_taken + i) % len(self._prompts)] for i in range(count)]
        self._num_taken += count
        return taken
