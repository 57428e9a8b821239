"""Which models can be divided among devices: transformers has a plan for them, and their sizes fit."""

from transformers import PreTrainedConfig

from cllm_core.errors import ModelLoadError
from cllm_core.models.source import ModelSource

# Sizes of a text model that devices share out, and what to call them.
_DIVIDED = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "intermediate_size": "features of its MLPs",
}


def require_divisible(source: ModelSource, config: PreTrainedConfig, num_parts: int) -> None:
    """Check, before any weight is read, that a model can be divided.

    Args:
        source: of the model.
        config: of its checkpoint.
        num_parts: number of devices.

    Raises:
        ModelLoadError: it cannot; the message names what does not fit and which numbers do.
    """
    text_config = config.get_text_config(decoder=True)
    remedy = "leave out tensor_parallel_size"
    if source.checkpoint.gguf_file is not None:
        raise ModelLoadError(
            f"{source.name}: a GGUF file cannot be divided among devices; export a folder, or {remedy}"
        )
    if source.adapter is not None:
        raise ModelLoadError(f"{source.name}: its adapter has to be merged first; use cllm export, or {remedy}")
    if not getattr(text_config, "base_model_tp_plan", None):
        raise ModelLoadError(
            f"{source.name}: transformers has no plan to divide {text_config.model_type} models; {remedy}"
        )
    for field, title in _DIVIDED.items():
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value % num_parts:
            fitting = [count for count in range(1, num_parts) if _divides_all(text_config, count)]
            raise ModelLoadError(
                f"{source.name}: its {value} {title} cannot be divided among tensor_parallel_size={num_parts} "
                f"devices; choose {' or '.join(map(str, fitting))}"
            )


def _divides_all(text_config: PreTrainedConfig, count: int) -> bool:
    values = (getattr(text_config, field, None) for field in _DIVIDED)
    return all(value % count == 0 for value in values if isinstance(value, int))
