"""Runs an evaluation: each model in turn, every example at every block length, then the report.

The model (the CLLM) goes first, then its target, then the reference that scores perplexity; one of them is in memory
at a time. Everything that was answered is on the disk at once, so that an interrupted run goes on where it stopped.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from cllm_core.config import MAX_BLOCK_LENGTH, EngineConfig
from cllm_core.errors import ConfigError
from cllm_core.evaluation.answering import AnsweringModel, ChatCodec, shared_lengths, with_times
from cllm_core.evaluation.machine import describe_machine
from cllm_core.evaluation.perplexity import LikelihoodScorer
from cllm_core.evaluation.picture import TrajectoryPicture
from cllm_core.evaluation.records import Answer, AnswerStore, fingerprint, fingerprint_model
from cllm_core.evaluation.report import ModelDescription, Results, save
from cllm_core.evaluation.summary import AR, best_cell, compare, summarise
from cllm_core.evaluation.tasks import Task, TaskName, choose_examples, load_task
from cllm_core.info import TokenizerBundle
from cllm_core.models.progress import OnProgress
from cllm_core.models.source import resolve_source

logger = logging.getLogger(__name__)

MODEL, TARGET = "model", "target"


class EvalConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to evaluate, and how.

    Attributes:
        task: what kind of examples `data` holds.
        data: file of the examples.
        tables: tables.json, for spider.
        model: the CLLM, or any model.
        target: what the CLLM was trained from; None evaluates the model alone.
        reference: model under which the perplexity of answers is measured; None is the target, else the model.
        output: folder of the results; one that holds an unfinished run with the same settings is gone on with.
        block_lengths: n in tokens, beside AR; empty takes the model's own.
        limit: examples drawn at random; None takes all.
        seed: of that draw, and of the rows that SQL is run on.
        max_tokens: of an answer; None takes the task's.
        repeats: times each answer is decoded and timed, one request at a time; 0 takes no times and decodes the
            examples in batches.
        cached_prefixes: time prompts whose beginning, as far as another example has it too, chosen or not, is in the
            prefix cache, as on a server that has answered that one; else the whole prompt is computed.
        allow_code_execution: consent to run what the model wrote (humaneval).
        command: for the report.
    """

    task: TaskName
    data: str
    model: EngineConfig
    output: str
    tables: str | None = None
    target: EngineConfig | None = None
    reference: EngineConfig | None = None
    block_lengths: tuple[int, ...] = ()
    limit: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    repeats: int = 2
    cached_prefixes: bool = False
    allow_code_execution: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for length in self.block_lengths:
            if not AR < length <= MAX_BLOCK_LENGTH:
                raise ConfigError(f"block_lengths: {length} must be in 2..{MAX_BLOCK_LENGTH}; AR is always measured")
        for name, value, low in (("limit", self.limit, 1), ("max_tokens", self.max_tokens, 1)):
            if value is not None and value < low:
                raise ConfigError(f"{name}={value}: must be >= {low}")
        if self.repeats < 0:
            raise ConfigError(f"repeats={self.repeats}: must be >= 0; 0 measures no times")
        if self.cached_prefixes and not self.repeats:
            raise ConfigError("cached_prefixes=True: repeats=0 measures no times; leave one of them out")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results, and a trajectory to look at for each model."""

    results: Results
    pictures: tuple[TrajectoryPicture, ...]


def evaluate(config: EvalConfig, on_progress: OnProgress) -> Evaluation:
    """Run an evaluation and write its files to `config.output`.

    Args:
        config: what to do.
        on_progress: called with (stage, fraction) while a model loads.

    Raises:
        ConfigError, DataError: a setting or a file is at fault.
        ModelLoadError: a model cannot be loaded.
        PromptTooLong: an example does not fit the context; no example of that model was answered then.
    """
    task = load_task(
        config.task,
        Path(config.data),
        tables=Path(config.tables) if config.tables else None,
        seed=config.seed,
        allow_code_execution=config.allow_code_execution,
    )
    run = _Run(config, task, AnswerStore(Path(config.output), _identity(config, on_progress)), on_progress)
    models = [run.answer_all(MODEL, config.model)]
    if config.target is not None:
        models.append(run.answer_all(TARGET, config.target))
    results = run.results(models)
    save(results, Path(config.output))
    return Evaluation(results, tuple(model.picture for model in models))


@dataclass(frozen=True, slots=True)
class _Answered:
    """What remains of a model after it has answered everything and was dropped from memory."""

    description: ModelDescription
    tokenizer: TokenizerBundle
    picture: TrajectoryPicture


class _Run:
    """One evaluation under way."""

    def __init__(self, config: EvalConfig, task: Task, store: AnswerStore, on_progress: OnProgress) -> None:
        self._config = config
        self._task = task
        self._store = store
        self._on_progress = on_progress
        self._examples = choose_examples(task.examples, config.limit, config.seed)
        self._max_tokens = config.max_tokens or task.default_max_tokens
        self._block_lengths: tuple[int, ...] = tuple(dict.fromkeys((AR, *config.block_lengths)))

    def answer_all(self, role: str, config: EngineConfig) -> _Answered:
        """Load a model, let it answer what it has not answered yet, and drop it."""
        model = AnsweringModel(role, config, self._on_progress, prefix_caching=self._config.cached_prefixes)
        if self._block_lengths == (AR,):
            self._block_lengths = tuple(dict.fromkeys((AR, model.info.block_length)))
        if self._config.repeats:
            self._answer_in_turns(model)
        else:
            self._answer_in_batches(model)
        answered = _Answered(model.describe(), model.info.tokenizer, self._draw(model))
        del model
        _free_memory()
        return answered

    def results(self, models: Sequence[_Answered]) -> Results:
        """The report on all answers of the chosen examples at the chosen block lengths."""
        roles = [model.description.role for model in models]
        answers = [self._store.answers[key] for role in roles for key in self._keys(role)]
        likelihoods: dict[tuple[str, int, str], float] = {}
        reference = None
        if self._task.scores_likelihood:
            likelihoods, reference = self._score_likelihoods(answers, models)
        cells = summarise(answers, likelihoods)
        return Results(
            task=self._config.task,
            data=self._config.data,
            command=self._config.command,
            num_examples=len(self._examples),
            seed=self._config.seed,
            repeats=self._config.repeats,
            cached_prefixes=self._config.cached_prefixes,
            max_tokens=self._max_tokens,
            machine=describe_machine(),
            models=tuple(model.description for model in models),
            cells=tuple(cells),
            comparison=compare(cells, MODEL, TARGET),
            reference=reference,
        )

    def _keys(self, role: str) -> Iterator[tuple[str, int, str]]:
        """Keys of the answers that this run needs of a model."""
        return (
            (role, block_length, example.example_id)
            for block_length in self._block_lengths
            for example in self._examples
        )

    def _answer_in_turns(self, model: AnsweringModel) -> None:
        """One request at a time, the block lengths in turns (A B A B): a change of the machine's speed meets all.

        An example that lacks any block length is measured at all of them again, since turns are what is compared.
        """
        prompts = {example.example_id: model.prompt(example, self._max_tokens) for example in self._examples}
        missing = {key[2] for key in self._keys(model.role) if key not in self._store.answers}
        if not missing:
            return
        cached = self._shared_lengths(model) if self._config.cached_prefixes else dict.fromkeys(prompts, 0)
        model.warm_up(next(iter(prompts.values())), self._block_lengths)
        for example in tqdm([e for e in self._examples if e.example_id in missing], desc=model.role, unit="example"):
            prompt = prompts[example.example_id]
            turns = [
                [
                    model.decode_behind(cached[example.example_id], prompt, block_length)
                    for block_length in self._block_lengths
                ]
                for _ in range(self._config.repeats)
            ]
            for block_length, outputs in zip(self._block_lengths, zip(*turns, strict=True), strict=True):
                answer = model.answer(self._task, example, block_length, outputs[0])
                self._store.add(with_times(answer, outputs))

    def _answer_in_batches(self, model: AnsweringModel) -> None:
        """Many requests together, which is faster but says nothing on the speed of one."""
        prompts = {example.example_id: model.prompt(example, self._max_tokens) for example in self._examples}
        with tqdm(total=len(prompts) * len(self._block_lengths), desc=model.role, unit="answer") as bar:
            for block_length in self._block_lengths:
                answered = {key[2] for key in self._store.answers if key[:2] == (model.role, block_length)}
                missing = [example for example in self._examples if example.example_id not in answered]
                bar.update(len(prompts) - len(missing))
                size = model.num_together(list(prompts.values()), block_length)
                for start in range(0, len(missing), size):
                    batch = missing[start : start + size]
                    outputs = model.decode([prompts[example.example_id] for example in batch], block_length)
                    for example, output in zip(batch, outputs, strict=True):
                        self._store.add(model.answer(self._task, example, block_length, output))
                        bar.update()

    def _shared_lengths(self, model: AnsweringModel) -> dict[str, int]:
        """Of all examples, chosen or not: a higher limit must not change what the times of others mean."""
        ids = {example.example_id: model.codec.prompt_ids(example.message) for example in self._task.examples}
        return shared_lengths(ids)

    def _draw(self, model: AnsweringModel) -> TrajectoryPicture:
        """The first example at the model's best block length; saved where matplotlib is installed."""
        answers = [self._store.answers[key] for key in self._keys(model.role)]
        best = best_cell(summarise(answers, {}), model.role)
        block_length = best.block_length if best else AR
        output = model.decode([model.prompt(self._examples[0], self._max_tokens)], block_length)[0]
        title = f"{model.info.name}, n = {block_length}, example {self._examples[0].example_id}"
        picture = TrajectoryPicture(title, output.trajectory, model.codec.text)
        try:
            picture.save_png(self._store.folder / f"trajectory-{model.role}.png")
        except ConfigError as error:
            logger.warning("no PNG of the trajectory: %s", error)
        return picture

    def _score_likelihoods(
        self, answers: Sequence[Answer], models: Sequence[_Answered]
    ) -> tuple[dict[tuple[str, int, str], float], str]:
        """Negative log-likelihood of every answer under the reference, and the name of the reference."""
        config = self._config.reference or self._config.target or self._config.model
        scorer = LikelihoodScorer(config, self._on_progress)
        for model in models:
            scorer.require_same_tokens(model.tokenizer)
        codec = ChatCodec(scorer.tokenizer, scorer.name)
        prompts = {example.example_id: codec.prompt_ids(example.message) for example in self._examples}
        by_text: dict[tuple[str, tuple[int, ...]], float] = {}  # most answers at n > 1 equal those at 1
        for answer in tqdm(answers, desc="perplexity", unit="answer"):
            text = (answer.example, answer.token_ids)
            if text not in by_text:
                by_text[text] = scorer.negative_log_likelihood(prompts[answer.example], answer.token_ids)
        return {answer.key: by_text[answer.example, answer.token_ids] for answer in answers}, scorer.name


def _identity(config: EvalConfig, on_progress: OnProgress) -> dict[str, object]:
    """What the answers depend on. Block lengths and limit are not part of it: a run can be extended by both."""
    return {
        "task": config.task,
        "data": fingerprint(Path(config.data)),
        "tables": fingerprint(Path(config.tables)) if config.tables else None,
        "seed": config.seed,
        "max_tokens": config.max_tokens,
        "repeats": config.repeats,
        "cached_prefixes": config.cached_prefixes,
        "model": _model_identity(config.model, on_progress),
        "target": _model_identity(config.target, on_progress) if config.target else None,
    }


def _model_identity(config: EngineConfig, on_progress: OnProgress) -> dict[str, object]:
    """The settings without those of capacity, and fingerprints of the files: what is named may be trained anew."""
    names = (
        "model",
        "adapter",
        "revision",
        "dtype",
        "quantization",
        "device",
        "max_model_len",
        "num_threads",
        "drafters",
    )
    identity = {name: value for name, value in msgspec.structs.asdict(config).items() if name in names}
    source = resolve_source(config, on_progress)
    identity["files"] = fingerprint_model(source.checkpoint.path)
    identity["adapter_files"] = fingerprint_model(source.named_adapter) if source.named_adapter else None
    return identity


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
