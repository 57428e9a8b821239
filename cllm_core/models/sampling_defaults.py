"""How a checkpoint wants to be sampled where nobody says otherwise: its generation_config.json, or keys of its GGUF."""

import logging
from collections.abc import Iterator, Mapping

import msgspec

from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.gguf.file import GgufFile
from cllm_core.models.gguf.keys import shortest
from cllm_core.request import BOUNDS, SamplingDefaults

logger = logging.getLogger(__name__)

JSON_FIELDS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Of SamplingDefaults, by their names in generation_config.json."""

GGUF_PREFIX = "general.sampling."

GGUF_FIELDS: Mapping[str, str] = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Of SamplingDefaults, by their keys below GGUF_PREFIX."""

_OFF = -1  # how some files spell that top_k is off
_PENALISED = "penalty_last_n"  # as many tokens; 0 turns the penalty off, and here it always counts the whole text


def read_sampling_defaults(checkpoint: Checkpoint) -> SamplingDefaults:
    """What the checkpoint names; values that make no sense are left out with a warning.

    `do_sample` is not looked at, as in vLLM: checkpoints that were only ever evaluated greedily say false.
    """
    if checkpoint.gguf_file is not None:
        return _convert(_stated_in_gguf(checkpoint.gguf), GGUF_FIELDS, file=checkpoint.gguf_file)
    path = checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        stated = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except msgspec.MsgspecError as error:
        logger.warning("%s: cannot be read (%s); it sets no defaults of sampling", path, error)
        return SamplingDefaults()
    return _convert(stated, JSON_FIELDS, file=path.name)


def _stated_in_gguf(file: GgufFile) -> dict[str, object]:
    stated: dict[str, object] = {
        key.removeprefix(GGUF_PREFIX): shortest(value) if isinstance(value, float) else value
        for key, value in file.values.items()
        if key.startswith(GGUF_PREFIX)
    }
    if stated.pop(_PENALISED, _OFF) == 0:
        stated.pop("penalty_repeat", None)
    others = sorted(GGUF_PREFIX + name for name in stated.keys() - GGUF_FIELDS)
    if others:
        logger.warning("%s: %s: sampling of this kind is not applied", file.path, ", ".join(others))
    return stated


def _convert(stated: Mapping[str, object], fields: Mapping[str, str], *, file: str) -> SamplingDefaults:
    return msgspec.convert(dict(_valid(stated, fields, file=file)), SamplingDefaults)


def _valid(stated: Mapping[str, object], fields: Mapping[str, str], *, file: str) -> Iterator[tuple[str, float | int]]:
    for name, field in fields.items():
        value = 0 if name == "top_k" and stated.get(name) == _OFF else stated.get(name)
        if value is None:
            continue
        try:
            number: float | int = msgspec.convert({field: value}, SamplingDefaults).values()[field]
            if BOUNDS[field].include(number):
                yield field, number
                continue
        except msgspec.ValidationError:
            pass
        logger.warning("%s: %s=%r is no number in its range; left out", file, name, value)
