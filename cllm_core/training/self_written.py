"""Prompts that a model writes itself: shown only what opens the user's turn of its chat template, it writes a user's
message (Magpie, arXiv:2406.08464). They are what the model expects to be asked, with no data set needed.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec
from tqdm import tqdm

from cllm_core.engine.engine import Engine
from cllm_core.errors import ConfigError
from cllm_core.request import NewRequest, SamplingParams
from cllm_core.tasks.records import read_json_lines
from cllm_core.training.config import TrajectoryConfig
from cllm_core.training.encoding import ConversationEncoder
from cllm_core.training.launch import world_size
from cllm_core.training.prompts import Conversation, Message

logger = logging.getLogger(__name__)

PROMPTS_FILE = "prompts.jsonl"
_MARK = "\x00here\x00"  # stands for the user's message in a rendered template
_MAX_TOKENS = 192
_TRIES = 4  # prompts asked for, per prompt wanted, before giving up


class WrittenPrompt(msgspec.Struct, frozen=True):
    """A line of the prompts file, which `--data` reads too.

    Attributes:
        number: of the sample that it came from; a continued run samples on from there.
        prompt: the user's message.
    """

    number: int
    prompt: str


def load_or_write_prompts(engine: Engine, encoder: ConversationEncoder, config: TrajectoryConfig) -> list[Conversation]:
    """The prompts of the output folder; where it has fewer than wanted, the model writes more and they are kept there.

    Args:
        engine: of the model.
        encoder: of the same model.
        config: number, temperature, seed and folder.

    Raises:
        ConfigError: the model has no chat template, or does not write enough usable prompts; or there are several
            processes and the prompts are not written yet.
        DataError: the prompts kept in the folder are damaged.
    """
    path = config.output / PROMPTS_FILE
    prompts = read_json_lines(path, WrittenPrompt) if path.exists() else []
    if len(prompts) < config.self_written:
        if world_size() > 1:
            raise ConfigError(
                f"self_written={config.self_written}: {path} has {len(prompts)} prompts, and one process alone can "
                "write more; run the command without torchrun until it begins to record, or give data"
            )
        prompts = _write_prompts(engine, encoder, config, prompts)
    return [Conversation((Message("user", written.prompt),)) for written in prompts[: config.self_written]]


def opening_text(encoder: ConversationEncoder) -> str:
    """What the chat template writes before the user's message.

    Raises:
        ConfigError: there is no template, or it changes the message.
    """
    if not encoder.has_template:
        raise ConfigError("self_written: the model has no chat template to write prompts from; give data instead")
    before, mark, _ = encoder.prompt_text(Conversation((Message("user", _MARK),))).partition(_MARK)
    if not mark:
        raise ConfigError(
            "self_written: the chat template does not show the user's message as it is; give data instead"
        )
    return before


def _write_prompts(
    engine: Engine, encoder: ConversationEncoder, config: TrajectoryConfig, prompts: list[WrittenPrompt]
) -> list[WrittenPrompt]:
    opening = tuple(encoder.codec.encode(opening_text(encoder), add_special_tokens=False))
    found = {written.prompt: written for written in prompts}  # keeps the order and drops doubles
    num_tried = prompts[-1].number + 1 if prompts else 0
    with tqdm(total=config.self_written, initial=len(found), unit="prompt written", dynamic_ncols=True) as bar:
        while len(found) < config.self_written:
            if num_tried >= _TRIES * config.self_written:
                raise ConfigError(
                    f"self_written={config.self_written}: only {len(found)} different prompts came of {num_tried}; "
                    "ask for fewer, or raise prompt_temperature"
                )
            wanted = min(config.self_written - len(found), 4 * config.max_num_seqs)
            for written in _sample(engine, encoder, opening, config, numbers=range(num_tried, num_tried + wanted)):
                if written.prompt:
                    found.setdefault(written.prompt, written)
            num_tried += wanted
            _save(config.output / PROMPTS_FILE, found.values())
            bar.update(len(found) - bar.n)
    return list(found.values())


def _sample(
    engine: Engine,
    encoder: ConversationEncoder,
    opening: tuple[int, ...],
    config: TrajectoryConfig,
    *,
    numbers: range,
) -> list[WrittenPrompt]:
    """User's messages that ended by themselves, in the order of their numbers."""
    outputs: dict[str, list[int]] = {}
    for number in numbers:
        params = SamplingParams(
            temperature=config.prompt_temperature, seed=config.seed + number, max_tokens=_MAX_TOKENS
        )
        engine.add_request(NewRequest(request_id=str(number), prompt_ids=opening, params=params))
        outputs[str(number)] = []
    ended = []
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
            if output.finish_reason == "stop":
                text = encoder.codec.decode(outputs[output.request_id]).strip()
                ended.append(WrittenPrompt(int(output.request_id), text))
    return sorted(ended, key=lambda written: written.number)


def _save(path: Path, prompts: Iterable[WrittenPrompt]) -> None:
    """Replace the file as a whole: an interrupted run leaves no half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(b"".join(msgspec.json.encode(written) + b"\n" for written in prompts))
    unfinished.replace(path)
