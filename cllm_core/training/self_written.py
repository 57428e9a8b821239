"""Prompts that a model writes itself: shown only what opens the user's turn of its chat template, it writes a user's
message (Magpie, arXiv:2406.08464). They are what the model expects to be asked, with no data set needed.
"""

import logging
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


def load_or_write_prompts(engine: Engine, encoder: ConversationEncoder, config: TrajectoryConfig) -> list[Conversation]:
    """The prompts of the output folder; where it has fewer than wanted, the model writes more and they are kept there.

    Args:
        engine: of the model.
        encoder: of the same model.
        config: number, temperature, seed and folder.

    Raises:
        ConfigError: the model has no chat template, or does not write enough usable prompts; or there are several
            processes and the prompts are not written yet.
    """
    path = config.output / PROMPTS_FILE
    prompts = [c.messages[-1].content for c in read_json_lines(path, Conversation)] if path.exists() else []
    if len(prompts) < config.self_written:
        if world_size() > 1:
            raise ConfigError(
                f"self_written={config.self_written}: {path} has {len(prompts)} prompts, and one process alone can "
                "write more; run the command without torchrun until it begins to record, or give data"
            )
        prompts = _write_prompts(engine, encoder, config, prompts)
        _save(path, prompts)
    return [Conversation((Message("user", prompt),)) for prompt in prompts[: config.self_written]]


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
    engine: Engine, encoder: ConversationEncoder, config: TrajectoryConfig, prompts: list[str]
) -> list[str]:
    opening = tuple(encoder.codec.encode(opening_text(encoder), add_special_tokens=False))
    found = dict.fromkeys(prompts)  # keeps the order and drops doubles
    num_tried = 0
    with tqdm(total=config.self_written, initial=len(found), unit="prompt written", dynamic_ncols=True) as bar:
        while len(found) < config.self_written:
            if num_tried >= _TRIES * config.self_written:
                raise ConfigError(
                    f"self_written={config.self_written}: only {len(found)} different prompts came of {num_tried}; "
                    "ask for fewer, or raise prompt_temperature"
                )
            wanted = min(config.self_written - len(found), 4 * config.max_num_seqs)
            texts = _sample(engine, encoder, opening, config, first=num_tried, count=wanted)
            num_tried += wanted
            found |= dict.fromkeys(text for text in texts if text)
            bar.update(len(found) - bar.n)
    return list(found)


def _sample(
    engine: Engine,
    encoder: ConversationEncoder,
    opening: tuple[int, ...],
    config: TrajectoryConfig,
    *,
    first: int,
    count: int,
) -> list[str]:
    """User's messages that ended by themselves."""
    outputs: dict[str, list[int]] = {}
    for number in range(first, first + count):
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
                ended.append(encoder.codec.decode(outputs[output.request_id]).strip())
    return ended


def _save(path: Path, prompts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [msgspec.json.encode(Conversation((Message("user", prompt),))) for prompt in prompts]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
