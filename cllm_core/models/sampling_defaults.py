"""How a checkpoint wants to be sampled where nobody says otherwise: its generation_config.json."""

import logging
from collections.abc import Iterator, Mapping

import msgspec

from cllm_core.models.checkpoint import Checkpoint
from cllm_core.request import BOUNDS, SamplingDefaults

logger = logging.getLogger(__name__)

_FIELDS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Of SamplingDefaults, by their names in the file."""

_OFF = -1  # how some files spell that top_k is off


def read_sampling_defaults(checkpoint: Checkpoint) -> SamplingDefaults:
    """What the file names; values that make no sense are left out with a warning.

    `do_sample` is not looked at, as in vLLM: checkpoints that were only ever evaluated greedily say false.
    """
    path = checkpoint.folder / "generation_config.json"
    if checkpoint.gguf_file is not None or not path.is_file():
        return SamplingDefaults()
    try:
        stated = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except msgspec.MsgspecError as error:
        logger.warning("%s: cannot be read (%s); it sets no defaults of sampling", path, error)
        return SamplingDefaults()
    return msgspec.convert(dict(_valid(stated)), SamplingDefaults)


def _valid(stated: Mapping[str, object]) -> Iterator[tuple[str, float | int]]:
    for name, field in _FIELDS.items():
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
        logger.warning("generation_config.json: %s=%r is no number in its range; left out", name, value)
