"""What a model is evaluated on: prompts as chat messages, and a score for each answer. No torch in here."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from cllm_core.errors import ConfigError
from cllm_core.evaluation import gsm8k, humaneval
from cllm_core.evaluation.sql.judge import SqlJudge
from cllm_core.evaluation.sql.query_text import normalise
from cllm_core.tasks.records import read_json_lines
from cllm_core.tasks.spider import Schema, SpiderExample, format_prompt, load_examples, load_schemas

TaskName = Literal["spider", "gsm8k", "humaneval", "chat"]
Scores = Mapping[str, float]

_SQL_FENCE = re.compile(r"```(?:[ \t]*\w*[ \t]*\n|sql\b)?(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt: `example_id` is unique in its task, `message` is the user's."""

    example_id: str
    message: str


class Task(Protocol):
    """Examples and how their answers are scored.

    Attributes:
        default_max_tokens: output limit that long answers of the task fit in, in tokens.
        scores_likelihood: the quality of answers is their perplexity under the target model.
    """

    default_max_tokens: int
    scores_likelihood: bool

    @property
    def examples(self) -> Sequence[Example]:
        """All examples, in the order of the file."""
        ...

    def score(self, example_id: str, answer: str) -> Scores:
        """Measures of an answer by name, each 0..1; the same names for every answer."""
        ...


def load_task(
    name: TaskName, data: Path, *, tables: Path | None = None, seed: int = 0, allow_code_execution: bool = False
) -> Task:
    """Read the data of a task.

    Args:
        name: of the task.
        data: file of its examples.
        tables: tables.json, for spider.
        seed: of the random rows that SQL is run on.
        allow_code_execution: humaneval runs what the model wrote, and needs this consent.

    Raises:
        ConfigError: the task needs something that was not given.
        DataError: a file is missing, empty or broken.
    """
    match name:
        case "spider":
            if tables is None:
                raise ConfigError("task spider needs the schemas too: give --tables tables.json")
            return SpiderTask(data, tables, seed=seed)
        case "gsm8k":
            return Gsm8kTask(data)
        case "humaneval":
            if not allow_code_execution:
                raise ConfigError(
                    "task humaneval runs code that the model wrote, on this machine: "
                    "give --allow-code-execution where that is safe (a container)"
                )
            return HumanEvalTask(data)
        case "chat":
            return ChatTask(data)


def choose_examples(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """`limit` examples drawn at random, in their order; a higher limit with the same seed adds to them."""
    if limit is None or limit >= len(examples):
        return list(examples)
    shuffled = random.Random(seed).sample(range(len(examples)), len(examples))
    return [examples[index] for index in sorted(shuffled[:limit])]


class SpiderTask:
    """Text to SQL: execution match on generated databases, and exact match of the normalised text."""

    default_max_tokens = 128
    scores_likelihood = False

    def __init__(self, data: Path, tables: Path, *, seed: int = 0) -> None:
        self._schemas = load_schemas(tables)
        self._examples = load_examples(data, self._schemas)
        self._seed = seed
        # several models and block lengths answer an example one after the other
        self._judge = lru_cache(maxsize=4)(self._make_judge)

    @property
    def examples(self) -> list[Example]:
        """Numbered from 0 in the order of the file."""
        return [
            Example(str(index), format_prompt(self._schemas[example.db_id], example.question))
            for index, example in enumerate(self._examples)
        ]

    def score(self, example_id: str, answer: str) -> Scores:
        """`execution` and `exact` match with the gold query."""
        sql, gold = read_sql(answer), self._examples[int(example_id)].query
        return {
            "execution": float(self._judge(int(example_id)).accepts(sql)),
            "exact": float(normalise(sql) == normalise(gold)),
        }

    def _make_judge(self, index: int) -> SqlJudge:
        example: SpiderExample = self._examples[index]
        schema: Schema = self._schemas[example.db_id]
        return SqlJudge(schema, example.query, seed=self._seed)


class Gsm8kTask:
    """Grade-school mathematics: the final number is right."""

    default_max_tokens = 320
    scores_likelihood = False

    def __init__(self, data: Path) -> None:
        self._records = read_json_lines(data, _Gsm8kRecord)

    @property
    def examples(self) -> list[Example]:
        """Numbered from 0 in the order of the file."""
        return [Example(str(index), record.question) for index, record in enumerate(self._records)]

    def score(self, example_id: str, answer: str) -> Scores:
        """`accuracy`."""
        return {"accuracy": float(gsm8k.same_number(answer, self._records[int(example_id)].answer))}


class HumanEvalTask:
    """Python functions: the tests of the problem pass."""

    default_max_tokens = 384
    scores_likelihood = False

    def __init__(self, data: Path) -> None:
        self._problems = {problem.task_id: problem for problem in read_json_lines(data, humaneval.Problem)}

    @property
    def examples(self) -> list[Example]:
        """Called as the problems are."""
        return [Example(name, humaneval.format_prompt(problem)) for name, problem in self._problems.items()]

    def score(self, example_id: str, answer: str) -> Scores:
        """`pass@1`."""
        problem = self._problems[example_id]
        return {"pass@1": float(humaneval.passes(humaneval.read_code(answer, problem), problem))}


class ChatTask:
    """Free prompts, the first turns of MT-bench questions for instance. There is no right answer to compare with."""

    default_max_tokens = 512
    scores_likelihood = True

    def __init__(self, data: Path) -> None:
        self._questions = read_json_lines(data, _Question)

    @property
    def examples(self) -> list[Example]:
        """Called by question_id where every question has one of its own, else numbered from 0."""
        names = [str(question.question_id) for question in self._questions if question.question_id is not None]
        if len(set(names)) < len(self._questions):
            names = [str(index) for index in range(len(self._questions))]
        return [Example(name, question.message) for name, question in zip(names, self._questions, strict=True)]

    def score(self, example_id: str, answer: str) -> Scores:
        """Nothing: perplexity, repetition and length are measured for every task."""
        del example_id, answer
        return {}


def read_sql(answer: str) -> str:
    """The query in an answer: its first code block, else all of it."""
    fence = _SQL_FENCE.search(answer)
    return (fence.group(1) if fence else answer).strip()


class _Gsm8kRecord(msgspec.Struct, frozen=True):
    question: str
    answer: str

    def __post_init__(self) -> None:
        if gsm8k.read_number(self.answer) is None:
            raise ConfigError("answer holds no number")


class _Question(msgspec.Struct, frozen=True):
    """A question as MT-bench writes it (`turns`), or a plain `prompt`."""

    turns: list[str] = []
    prompt: str | None = None
    question_id: int | str | None = None

    def __post_init__(self) -> None:
        if not self.message:
            raise ConfigError('neither "turns" nor "prompt" holds text')

    @property
    def message(self) -> str:
        return self.prompt if self.prompt is not None else next(iter(self.turns), "")
