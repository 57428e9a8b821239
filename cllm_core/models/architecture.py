"""Which architectures the engine can run, decided from the configuration before any weight is read."""

import inspect
import sys

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import PAGED_ATTENTION
from cllm_core.models.checkpoint import Checkpoint, is_multimodal
from cllm_core.models.own_attention import has_own_attention

_CAUSAL_LM = "AutoModelForCausalLM"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_CACHED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_architecture(checkpoint: Checkpoint, config: PreTrainedConfig, *, attention: str) -> None:
    """Raise ModelLoadError unless this is a decoder-only model whose only state is keys and values.

    Of a multimodal model the text part can be served, but neither trained nor exported. What attention layers do beyond
    that shows when they are called, and is refused there.
    """
    where = f"{checkpoint.path}: {_architecture_of(config)}"
    text_config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or text_config.is_encoder_decoder:
        raise ModelLoadError(f"{where} is an encoder-decoder; only decoder-only models can be served")
    if is_multimodal(config) and attention != PAGED_ATTENTION:
        raise ModelLoadError(f"{where} is not a text-only model; name its text model where there is one")
    model_class = _model_class(checkpoint, config)
    if model_class is None:
        raise ModelLoadError(f"{where} is not a causal language model that transformers knows")
    declared: list[str] = config.architectures or []
    if declared and model_class.__name__ not in declared:
        raise ModelLoadError(f"{where} is not a causal language model; this type's is {model_class.__name__}")
    uncached = sorted(set(getattr(text_config, "layer_types", None) or ()) - _CACHED_LAYER_TYPES)
    if model_class._is_stateful or uncached:
        raise ModelLoadError(
            f"{where} keeps other state than keys and values ({', '.join(uncached) or 'recurrent layers'}), "
            "which cannot be paged or rolled back"
        )
    if attention == PAGED_ATTENTION and not (is_multimodal(config) or _asks_for_attention(model_class)):
        raise ModelLoadError(f"{where} computes attention in its own code, so it cannot run on the paged cache")


def _asks_for_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether the layers can be told how to attend. Some classes can without saying so; the probe tells for sure."""
    if model_class._supports_attention_backend or has_own_attention(model_class):
        return True
    return _INTERFACE in inspect.getsource(sys.modules[model_class.__module__])


def _architecture_of(config: PreTrainedConfig) -> str:
    names: list[str] = config.architectures or [config.model_type or type(config).__name__]
    return "/".join(names)


def _model_class(checkpoint: Checkpoint, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers will build (`read_weights`), None where it knows none."""
    code: str | None = (getattr(config, "auto_map", None) or {}).get(_CAUSAL_LM)
    if code is not None and checkpoint.trust_remote_code:
        remote: type[PreTrainedModel] | None = get_class_from_dynamic_module(
            code, str(checkpoint.folder), local_files_only=True
        )
        return remote
    mapping = MODEL_FOR_MULTIMODAL_LM_MAPPING if is_multimodal(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        return None
    known = mapping[type(config)]
    chosen: type[PreTrainedModel] | None = known[0] if isinstance(known, tuple) else known
    return chosen
