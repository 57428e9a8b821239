"""Records Jacobi trajectories: runs the engine over prompts and notes every state on the way to each answer."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from tqdm import tqdm

from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.engine.engine import Engine
from cllm_core.engine.plan import StepPlan, StepResult
from cllm_core.errors import DataError
from cllm_core.models.progress import OnProgress
from cllm_core.models.source import model_to_train
from cllm_core.request import NewRequest, SamplingParams
from cllm_core.training.cleaning import reason_to_drop
from cllm_core.training.config import TrajectoryConfig
from cllm_core.training.encoding import ConversationEncoder
from cllm_core.training.examples import DraftState, Trajectory
from cllm_core.training.launch import rank, take_gpu, world_size
from cllm_core.training.prompts import Conversation, load_conversations
from cllm_core.training.self_written import load_or_write_prompts
from cllm_core.training.store import Record, StoreMeta, TrajectoryWriter, read_records, tokenizer_fingerprint

logger = logging.getLogger(__name__)

STATISTICS_FILE = "statistics.json"
_MIN_BATCHED_TOKENS = 1024

Prompt = tuple[int, tuple[int, ...]]  # index and token ids


def record_trajectories(config: TrajectoryConfig, on_progress: OnProgress) -> Path:
    """Record the prompts that the output folder does not hold yet; returns the folder.

    Started by torchrun, every process records its share of them.

    Raises:
        ModelLoadError: the teacher cannot be loaded.
        DataError: the prompts cannot be used, or the folder holds trajectories recorded in another way.
        ConfigError: the folder cannot be written, or a package is missing.
    """
    conversations = load_conversations(config.data) if config.data.data is not None else None
    take_gpu(config.device)
    engine = build_engine(_engine_config(config), on_progress)
    encoder = ConversationEncoder(engine.info.tokenizer, engine.info.eos_token_ids)
    with TrajectoryWriter(config.output, _meta(engine, config), shard_size=config.shard_size) as writer:
        if conversations is None:
            conversations = load_or_write_prompts(engine, encoder, config)
        done = _recorded_before(config.output, conversations)
        share = range(rank(), len(conversations), world_size())
        prompts = [(i, encoder.encode_prompt(conversations[i])) for i in share if i not in done]
        logger.info("%d prompts, %d of them recorded before", len(share), len(share) - len(prompts))
        for record in _record(engine, prompts, config):
            writer.write(msgspec.structs.replace(record, prompt=conversations[record.index].prompt_fingerprint))
    write_statistics(config.output)
    return config.output


class Recorder:
    """Decodes prompts greedily and yields their trajectories as they finish. It owns the engine while it runs.

    Args:
        engine: with a fixed block length.
        block_length: n of the windows, in tokens.
        max_tokens: limit of an answer.
    """

    def __init__(self, engine: Engine, *, block_length: int, max_tokens: int) -> None:
        self._engine = engine
        self._params = SamplingParams(temperature=0.0, block_length=block_length, max_tokens=max_tokens)
        self._running: dict[str, _Recording] = {}

    def run(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Trajectory]]:
        """Index and trajectory of every prompt, in the order of their ends; closing it early frees the engine."""
        waiting = iter(prompts)
        self._engine.observer = self._observe
        try:
            while True:
                self._fill(waiting)
                if not self._engine.has_work():
                    return
                yield from self._step()
        finally:
            self._engine.observer = None
            self._abort_all()

    def _fill(self, waiting: Iterator[Prompt]) -> None:
        """Keep as many requests in the engine as it decodes together."""
        while len(self._running) < self._engine.info.max_num_seqs:
            index, prompt_ids = next(waiting, (None, ()))
            if index is None:
                return
            request_id = str(index)
            self._engine.add_request(NewRequest(request_id=request_id, prompt_ids=prompt_ids, params=self._params))
            self._running[request_id] = _Recording(index, prompt_ids)

    def _step(self) -> Iterator[tuple[int, Trajectory]]:
        for output in self._engine.step():
            recording = self._running[output.request_id]
            recording.output_ids += output.token_ids
            if output.finish_reason is not None:
                del self._running[output.request_id]
                yield recording.index, recording.finish(ended=output.finish_reason == "stop")

    def _observe(self, plan: StepPlan, result: StepResult) -> None:
        for row, found in zip(plan.rows, result.rows, strict=True):
            if found.num_accepted and self._params.block_length != 1:  # AR has no drafts to record
                recording = self._running[row.request_id]
                num_accepted = row.last_accepted_position + 1 - len(recording.prompt_ids)
                recording.states.append(DraftState(num_accepted, found.window_ids[1:], found.unaccepted_ids))

    def _abort_all(self) -> None:
        for request_id in self._running:
            self._engine.abort(request_id)
        while self._engine.has_work():
            self._engine.step()
        self._running = {}


@dataclass(slots=True)
class _Recording:
    """A trajectory that grows."""

    index: int
    prompt_ids: tuple[int, ...]
    output_ids: list[int] = field(default_factory=list)
    states: list[DraftState] = field(default_factory=list)

    def finish(self, *, ended: bool) -> Trajectory:
        return Trajectory(self.prompt_ids, tuple(self.output_ids), tuple(self.states), finished=ended)


class Statistics(msgspec.Struct, kw_only=True):
    """What a folder of trajectories holds.

    Attributes:
        kept, dropped: trajectories, the dropped ones by reason.
        output_tokens, states: of those kept.
    """

    kept: int = 0
    dropped: dict[str, int] = {}
    output_tokens: int = 0
    states: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Accepted tokens per state, the teacher's own TPF; 0 where answers alone were recorded."""
        return self.output_tokens / self.states if self.states else 0.0


def write_statistics(folder: Path) -> Statistics:
    """Count what the folder holds and write it to statistics.json."""
    statistics = Statistics()
    dropped: Counter[str] = Counter()
    for record in read_records(folder):
        if record.dropped is not None:
            dropped[record.dropped] += 1
            continue
        statistics.kept += 1
        statistics.output_tokens += len(record.trajectory.output_ids)
        statistics.states += len(record.trajectory.states)
    statistics.dropped = dict(dropped)
    shown = {**msgspec.to_builtins(statistics), "tokens_per_forward": round(statistics.tokens_per_forward, 3)}
    (folder / STATISTICS_FILE).write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in shown.items()))
    return statistics


def _meta(engine: Engine, config: TrajectoryConfig) -> StoreMeta:
    """All that the records depend on, but for `limit`: a run with a higher one records what is missing."""
    data = config.data
    return StoreMeta(
        model=engine.info.name,
        tokenizer=tokenizer_fingerprint(engine.info.tokenizer),
        block_length=config.block_length,
        max_tokens=config.max_tokens,
        prompts=data.data or f"self-written, seed {config.seed}",
        adapter=config.adapter,
        split=data.split,
        prompt_column=data.prompt_column,
        tables=None if data.tables is None else str(data.tables),
        renamings=data.renamings,
        prompt_temperature=config.prompt_temperature if config.self_written else None,
        keep_unfinished=config.keep_unfinished,
        max_repetition=config.max_repetition,
    )


def _recorded_before(folder: Path, conversations: Sequence[Conversation]) -> set[int]:
    """Indices of the prompts that the folder holds.

    Raises:
        DataError: it holds another prompt under an index.
    """
    done = set()
    for record in read_records(folder):
        is_known = record.prompt is not None and record.index < len(conversations)
        if is_known and record.prompt != conversations[record.index].prompt_fingerprint:
            raise DataError(
                f"{folder} holds trajectories of other data (prompt {record.index + 1} differs): "
                "name another output folder"
            )
        done.add(record.index)
    return done


def _record(engine: Engine, prompts: list[Prompt], config: TrajectoryConfig) -> Iterator[Record]:
    """Records of the prompts, in the order of their ends."""
    limit = engine.info.max_model_len - config.max_tokens
    fitting = []
    for index, prompt_ids in prompts:
        if len(prompt_ids) <= limit:
            fitting.append((index, prompt_ids))
        else:
            yield Record(index, Trajectory((), ()), dropped="prompt too long")
    # prompts that begin alike one after another: their beginnings are computed once (prefix cache)
    fitting.sort(key=lambda prompt: prompt[1])
    recorder = Recorder(engine, block_length=config.block_length, max_tokens=config.max_tokens)
    num_tokens = num_states = num_dropped = 0
    with tqdm(total=len(fitting), unit="prompt", dynamic_ncols=True) as bar:
        for index, trajectory in recorder.run(fitting):
            reason = reason_to_drop(
                trajectory, keep_unfinished=config.keep_unfinished, max_repetition=config.max_repetition
            )
            yield Record(index, Trajectory((), ()) if reason else trajectory, reason)
            num_tokens += len(trajectory.output_ids)
            num_states += len(trajectory.states)
            num_dropped += reason is not None
            shown = f", TPF {num_tokens / num_states:.2f}" if num_states else ""
            bar.set_postfix_str(f"{num_tokens} tokens{shown}, {num_dropped} dropped")
            bar.update()


def _engine_config(config: TrajectoryConfig) -> EngineConfig:
    return EngineConfig(
        model=model_to_train(config.model, config.adapter),
        adapter=config.adapter,
        device=config.device,
        num_threads=config.num_threads,
        trust_remote_code=config.trust_remote_code,
        block_length=config.block_length,
        adaptive_block_length=False,  # a shorter window would be a state that the server never is in
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=max(_MIN_BATCHED_TOKENS, 2 * config.max_num_seqs * config.block_length),
    )
