"""Sources of drafts side by side: each alone and all together, on one task, against decoding token by token.

Turns are short and in order, so that a change of the machine's speed meets all. What one way of drafting learns - how
long windows pay, what past outputs said - no other finds, while one way keeps it from turn to turn, as a server does.
"""

import ast
import gc
import importlib
import inspect
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from cllm_core.engine.drafters.base import Drafter
from cllm_core.engine.engine import Learnt
from cllm_core.errors import ConfigError
from cllm_core.evaluation.answering import AnsweringModel
from cllm_core.evaluation.decode import Decoded, Prompt, decode
from cllm_core.evaluation.drafter_table import DrafterRow, DrafterTable, save_table
from cllm_core.evaluation.machine import describe_machine
from cllm_core.evaluation.records import Answer
from cllm_core.evaluation.report import ModelDescription
from cllm_core.evaluation.run import MODEL, TARGET, EvalConfig
from cllm_core.evaluation.summary import AR, tokens_per_forward_of
from cllm_core.evaluation.tasks import Example, Task, choose_examples, load_task
from cllm_core.models.progress import OnProgress

IN_FLIGHT = 8
_EXAMPLES_TOGETHER = 16  # of a turn with several in flight; else one
_DRAFTERS = "cllm_core.engine.drafters"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to draft.

    Attributes:
        name: for the report.
        drafters: sources to choose among, None where nothing is drafted.
        gated: whether the gated adapter proposes.
    """

    name: str
    drafters: tuple[str, ...] | None
    gated: bool = False


AR_WAY = Way("AR", None)


def compare_drafters(config: EvalConfig, training_costs: Mapping[str, str], on_progress: OnProgress) -> DrafterTable:
    """Measure each source that the model's settings name, and the target's with the same ones; write the table.

    Args:
        config: as for `evaluate`; block_lengths are left out, n is the model's.
        training_costs: by the name of a source, or of a role for the model itself, what its training took.
        on_progress: called with (stage, fraction) while a model loads.

    Raises:
        ConfigError: repeats is 0, or block lengths are given.
        DataError, ModelLoadError, PromptTooLong: as for `evaluate`.
    """
    if not config.repeats:
        raise ConfigError("repeats=0: sources are compared by times; give at least 1")
    if config.block_lengths:
        raise ConfigError("block_lengths: sources are compared at the model's own; leave them out, or set block_length")
    task = load_task(
        config.task,
        Path(config.data),
        tables=Path(config.tables) if config.tables else None,
        seed=config.seed,
        allow_code_execution=config.allow_code_execution,
    )
    examples = choose_examples(task.examples, config.limit, config.seed)
    max_tokens = config.max_tokens or task.default_max_tokens
    rows: list[DrafterRow] = []
    descriptions: list[ModelDescription] = []
    roles = [(MODEL, config.model), *([(TARGET, config.target)] if config.target is not None else [])]
    for role, model_config in roles:
        model = AnsweringModel(
            role, model_config, on_progress, prefix_caching=model_config.prefix_caching, is_adaptive=True
        )
        comparison = _Comparison(model, task, examples, [model.prompt(example, max_tokens) for example in examples])
        comparison.measure(config.repeats)
        rows += comparison.rows(training_costs)
        descriptions.append(model.describe())
        del model, comparison
        gc.collect()
    table = DrafterTable(
        task=config.task,
        data=config.data,
        command=config.command,
        num_examples=len(examples),
        seed=config.seed,
        repeats=config.repeats,
        max_tokens=max_tokens,
        in_flight=IN_FLIGHT,
        machine=describe_machine(),
        models=tuple(descriptions),
        rows=tuple(rows),
    )
    save_table(table, Path(config.output))
    return table


@dataclass(slots=True)
class _Measured:
    """What one way of one model brought: answers of the first repeat, and times by repeat."""

    answers: list[Answer] = field(default_factory=list)
    num_tokens: dict[tuple[int, bool], int] = field(default_factory=dict)
    seconds: dict[tuple[int, bool], float] = field(default_factory=dict)

    def add(self, key: tuple[int, bool], outputs: Sequence[Decoded], seconds: float) -> None:
        """Book a turn; key is the repeat, and whether several requests were in flight."""
        self.num_tokens[key] = self.num_tokens.get(key, 0) + sum(len(output.token_ids) for output in outputs)
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def median_rate(self, *, together: bool) -> float:
        """Tokens per second, over the repeats."""
        return statistics.median(self._rate(key) for key in self.seconds if key[1] == together)

    def median_speedup(self, plain: "_Measured", *, together: bool) -> float:
        """Over another way in the same repeats."""
        return statistics.median(self._rate(key) / plain._rate(key) for key in self.seconds if key[1] == together)

    def _rate(self, key: tuple[int, bool]) -> float:
        return self.num_tokens[key] / self.seconds[key]


class _Comparison:
    """The ways of one model, measured in turns.

    Args:
        model: without work.
        task, examples: what is answered, and scored.
        prompts: of the examples.
    """

    def __init__(
        self, model: AnsweringModel, task: Task, examples: Sequence[Example], prompts: Sequence[Prompt]
    ) -> None:
        self._model, self._task = model, task
        self._examples, self._prompts = examples, prompts
        self._ways = list(_ways(model))
        self._measured = {way.name: _Measured() for way in self._ways}
        self._learnt: dict[tuple[str, bool], Learnt] = {}

    def measure(self, num_repeats: int) -> None:
        """Decode everything in every way."""
        self._model.warm_up(self._prompts[0], [AR, self._model.info.block_length])
        num_prompts = len(self._prompts)
        several = [slice(start, start + _EXAMPLES_TOGETHER) for start in range(0, num_prompts, _EXAMPLES_TOGETHER)]
        turns = [(False, slice(index, index + 1)) for index in range(num_prompts)] + [(True, turn) for turn in several]
        for together, turn in tqdm(turns, desc=self._model.role, unit="turn"):
            for repeat in range(num_repeats):
                for way in self._ways:
                    self._take_turn(way, (repeat, together), turn)

    def rows(self, training_costs: Mapping[str, str]) -> list[DrafterRow]:
        """The figures of all ways."""
        return [self._row(way, training_costs) for way in self._ways]

    def _take_turn(self, way: Way, key: tuple[int, bool], turn: slice) -> None:
        engine, (repeat, together) = self._model.engine, key
        block_length = AR if way.drafters is None else self._model.info.block_length
        elsewhere = engine.exchange_learnt(self._learnt.get((way.name, together)))
        started = time.perf_counter()
        outputs = decode(
            engine,
            self._prompts[turn],
            block_length=block_length,
            # What another way or repeat was answered is not found; what this one was answered in earlier turns is.
            cache_salt=f"{way.name} {repeat} {together}",
            drafters=way.drafters,
            gated=way.gated,
            in_flight=IN_FLIGHT if together else 1,
        )
        seconds = time.perf_counter() - started
        self._learnt[way.name, together] = engine.exchange_learnt(elsewhere)
        measured = self._measured[way.name]
        measured.add(key, outputs, seconds)
        if key == (0, False):
            measured.answers += [
                self._model.answer(self._task, example, block_length, output)
                for example, output in zip(self._examples[turn], outputs, strict=True)
            ]

    def _row(self, way: Way, training_costs: Mapping[str, str]) -> DrafterRow:
        model, measured, plain = self._model, self._measured[way.name], self._measured[AR_WAY.name]
        infos = [drafter for drafter in model.info.drafters if drafter.name in (way.drafters or ())]
        gated_bytes = model.info.gated.num_bytes if way.gated and model.info.gated is not None else 0
        names = [*(info.name for info in infos), *(["gated"] if way.gated else [])]
        trained = [training_costs[name] for name in (model.role, *names) if name in training_costs]
        answers = measured.answers
        pairs = zip(answers, plain.answers, strict=True)
        return DrafterRow(
            model=model.role,
            name=way.name,
            scores={name: statistics.fmean(answer.scores[name] for answer in answers) for name in answers[0].scores},
            same_as_ar=statistics.fmean(answer.token_ids == base.token_ids for answer, base in pairs),
            tokens_per_forward=tokens_per_forward_of(answers) or 1.0,
            tokens_per_second=measured.median_rate(together=False),
            tokens_per_second_together=measured.median_rate(together=True),
            speedup=measured.median_speedup(plain, together=False),
            speedup_together=measured.median_speedup(plain, together=True),
            num_bytes=gated_bytes + sum(info.num_bytes for info in infos),
            resident_bytes=gated_bytes + sum(info.resident_bytes for info in infos),
            training="; ".join(trained),
            num_lines=sum(num_lines(source) for source in model.engine.runner.drafting.sources if source.name in names),
        )


def _ways(model: AnsweringModel) -> Iterator[Way]:
    names = tuple(drafter.name for drafter in model.info.drafters)
    yield AR_WAY
    for name in names:
        yield Way(name, (name,))
    if len(names) > 1:
        yield Way(" + ".join(names), names)
    if model.info.gated is not None:
        yield Way(" + ".join(("gated", *names)), names, gated=True)


def num_lines(source: Drafter) -> int:
    """Lines of code that a source consists of: its module, and those of the same package that only it imports."""
    own = inspect.getmodule(type(source))
    assert own is not None
    shared = {"base", "copying"}  # of all sources
    return sum(_num_code_lines(module) for module in _with_imports(own, shared))


def _with_imports(module: ModuleType, shared: set[str]) -> list[ModuleType]:
    """A module, and those of the drafters' package that it imports."""
    found = [module]
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_DRAFTERS}."):
            name = (node.module or "").removeprefix(f"{_DRAFTERS}.")
            if name not in shared:
                found += _with_imports(importlib.import_module(f"{_DRAFTERS}.{name}"), shared)
    return list(dict.fromkeys(found))


def _num_code_lines(module: ModuleType) -> int:
    return sum(bool(line.strip()) for line in inspect.getsource(module).splitlines())
