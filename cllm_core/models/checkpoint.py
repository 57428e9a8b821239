"""Reading one checkpoint from the disk with transformers: config, weights, tokenizer.

Foreign errors become ModelLoadError. It knows folders and GGUF files; where they come from and what happens to the
weights afterwards is not its business.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.checkpoint import read_gguf_config, read_gguf_weights, stored_gguf_dtype
from cllm_core.models.gguf.file import GgufFile
from cllm_core.models.gguf.tokenizer import read_gguf_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SAFETENSORS_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NUM_NAMED_KEYS = 4


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights lie.

    Attributes:
        folder: with config.json and safetensors or .bin weights, or with `gguf_file`.
        gguf_file: name of a GGUF file in the folder, which then brings config, weights and tokenizer.
        trust_remote_code: let transformers run the Python files of the folder.
    """

    folder: Path
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def path(self) -> Path:
        """The folder or the GGUF file, for messages."""
        return self.folder / self.gguf_file if self.gguf_file else self.folder

    @functools.cached_property
    def gguf(self) -> GgufFile:
        """The GGUF file, whose header is read once for config, tokenizer and weights.

        Raises:
            ModelLoadError: it is damaged or incomplete.
        """
        return GgufFile(self.path)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` of a folder takes."""
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": True}


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ModelLoadError: it is missing or broken, or transformers does not know the architecture.
    """
    if checkpoint.gguf_file is None and not (checkpoint.folder / "config.json").is_file():
        raise ModelLoadError(
            f"{checkpoint.folder}: has no config.json; name a folder written by transformers' save_pretrained, "
            "a .gguf file or a Hub id"
        )
    with _translated(checkpoint.path, "the configuration"), quiet():
        if checkpoint.gguf_file is not None:
            return read_gguf_config(checkpoint.gguf)
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, **checkpoint.options)
    return config


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the model takes more than text: its config holds that of a text model among others."""
    return config.get_text_config(decoder=True) is not config


def stored_dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype | None:
    """Precision of the stored weights: what the config says, else what the weights are; None where quantised."""
    if checkpoint.gguf_file is not None:
        return stored_gguf_dtype(checkpoint.gguf)
    for part in (config, config.get_text_config(decoder=True)):
        if isinstance(part.dtype, torch.dtype):
            return part.dtype
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ModelLoadError(f"{path}: damaged ({error}); fetch it again") from error
        floats = [dtype for name, dtype in _SAFETENSORS_FLOATS.items() if name in found]
        if floats:
            return floats[0]
    return torch.float32


def read_weights(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    num_parts: int = 1,
) -> PreTrainedModel:
    """The model in eval mode on `device`, every weight from the checkpoint.

    Args:
        checkpoint: where the weights lie.
        config: from `read_config`.
        dtype: of the weights; the few that the architecture keeps in float32 stay there.
        device: that the weights are read to.
        attention: name of transformers' attention implementation.
        num_parts: ranks of the process group that the model is divided among; this one reads its part.

    Raises:
        ModelLoadError: weights are damaged, missing, left over or of another shape than the config says.
    """
    options: dict[str, Any] = checkpoint.options
    # the stubs do not know output_loading_info
    model_class: Any = AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM
    if checkpoint.gguf_file is not None:
        options = {"state_dict": read_gguf_weights(checkpoint.gguf, config, dtype)}
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if num_parts > 1:
        options = {**options, "distributed_config": DistributedConfig(tp_size=num_parts)}
    with _translated(checkpoint.path, "the weights"), quiet():
        model, report = model_class.from_pretrained(
            checkpoint.folder if checkpoint.gguf_file is None else None,
            config=config,
            dtype=dtype,
            # given a map, transformers marks the model as dispatched, and PEFT would hang hooks on its layers
            device_map=None if device.type == "cpu" or num_parts > 1 else {"": device},
            attn_implementation="eager",  # some classes know no other than transformers' own while they are built
            weights_only=True,
            ignore_mismatched_sizes=True,  # so that they are reported by name; they are refused below
            output_loading_info=True,
            **options,
        )
        model.set_attn_implementation(attention)
    _require_complete(checkpoint.path, report)
    loaded: PreTrainedModel = model
    return loaded


def read_tokenizer(checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Args:
        checkpoint: that brings it.
        config: from `read_config`.

    Raises:
        ModelLoadError: it is missing or broken.
    """
    if checkpoint.gguf_file is None and not has_tokenizer(checkpoint.folder):
        raise ModelLoadError(
            f"{checkpoint.folder}: has no tokenizer; copy tokenizer.json and tokenizer_config.json of its base there"
        )
    with _translated(checkpoint.path, "the tokenizer"), quiet():
        if checkpoint.gguf_file is not None:
            return read_gguf_tokenizer(checkpoint.gguf)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.folder, **checkpoint.options)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def read_generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """The checkpoint's generation_config.json, None where it has none.

    Raises:
        ModelLoadError: it is broken.
    """
    if checkpoint.gguf_file is not None or not (checkpoint.folder / "generation_config.json").is_file():
        return None
    with _translated(checkpoint.path, "the generation config"), quiet():
        return GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; what matters is raised or reported."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextmanager
def _translated(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:  # foreign files through foreign code: any error may come, and the cause is kept
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ModelLoadError(f"{path}: cannot read {what}: {detail}") from error


def _require_complete(path: Path, report: dict[str, Any]) -> None:
    for kind, meaning in (
        ("missing_keys", "weights are missing, and random ones would take their place"),
        ("mismatched_keys", "weights have another shape than the configuration says"),
        ("unexpected_keys", "weights are there that the architecture has no place for"),
        ("error_msgs", "weights could not be read"),
    ):
        found = sorted(key if isinstance(key, str) else " ".join(map(str, key)) for key in report[kind])
        if found:
            named = ", ".join(found[:_NUM_NAMED_KEYS]) + (", ..." if len(found) > _NUM_NAMED_KEYS else "")
            raise ModelLoadError(f"{path}: {meaning} ({len(found)}: {named}); fetch or convert the checkpoint again")
