"""Reading what is to be exported: weights with the adapter in them, tokenizer, and where they came from."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError, ModelLoadError
from cllm_core.export.config import ExportConfig, ExportDType
from cllm_core.export.layers import keep_first_layers
from cllm_core.models.architecture import check_architecture
from cllm_core.models.chat_templates import find_templates
from cllm_core.models.checkpoint import read_config, read_tokenizer, stored_dtype
from cllm_core.models.end_tokens import find_eos_token_ids
from cllm_core.models.loader import read_model, tokenizer_source
from cllm_core.models.progress import OnProgress
from cllm_core.models.source import ModelSource, resolve_source

_ATTENTION = "eager"  # never run, and known to all models; paged attention would be written into the model's settings
_DTYPES: dict[ExportDType, torch.dtype] = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A model ready to be written.

    Attributes:
        source: where it came from.
        model: on the CPU, adapter merged, in the precision to write.
        tokenizer: with the chat template that the server would use.
        eos_token_ids: ascending; any of them ends an output.
        num_layers: first layers that were kept; None: all.
    """

    source: ModelSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    num_layers: int | None = None


def read_merged(config: ExportConfig, on_progress: OnProgress) -> MergedModel:
    """Read the model that `config` names, its adapter merged.

    Raises:
        ModelLoadError: something is missing, damaged or does not fit together, the weights are quantised, or they
            are beyond the range of float16 where that is asked for.
        ConfigError: it has fewer layers than are to be kept.
    """
    named = EngineConfig(
        model=config.model,
        adapter=config.adapter,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    source = resolve_source(named, on_progress)
    if source.name != source.base_name and source.gated_adapter is not None:
        raise ConfigError(f"{source.name}: is a gated adapter, which is not merged; export its base {source.base_name}")
    model_config = read_config(source.checkpoint)
    check_architecture(source.checkpoint, model_config, attention=_ATTENTION)
    _require_unquantised(source, model_config)
    tokenizer = read_tokenizer(tokenizer_source(source), model_config)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = find_templates(tokenizer, model_name=source.name).default
    dtype = _DTYPES.get(config.dtype) or stored_dtype(source.checkpoint, model_config) or torch.bfloat16
    cpu = torch.device("cpu")
    model = read_model(source, model_config, dtype, cpu, attention=_ATTENTION, on_progress=on_progress)
    if dtype is torch.float16:
        _require_finite(model)
    eos_token_ids = find_eos_token_ids(source.checkpoint, model_config, tokenizer)
    if config.layers is not None:
        keep_first_layers(model, config.layers)
        source = replace(source, card=None)  # what the whole model was trained for
    return MergedModel(source, model, tokenizer, eos_token_ids, config.layers)


def _require_unquantised(source: ModelSource, model_config: PreTrainedConfig) -> None:
    """GGUF is read dequantised; other quantised formats are their libraries' own."""
    if source.checkpoint.gguf_file is None and getattr(model_config, "quantization_config", None) is not None:
        raise ModelLoadError(f"{source.base_name}: has quantised weights; export the unquantised model")


def _require_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelLoadError(f"{name}: has values beyond the range of float16; export as bf16 or f32")
