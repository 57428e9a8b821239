"""What each layer of a model keeps in the KV cache, seen by running one token through it.

The first run of a model that was just read: what its classes and its config do not agree on shows here.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.paged import LayerProbe, LayerSpec

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Named where a model does not run: most often two of them do not fit each other.
_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qk_head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)


def probe_layers(model: PreTrainedModel) -> list[LayerSpec]:
    """Run one token through the model and note what each attention layer would store.

    Args:
        model: loaded with attn_implementation="cllm_paged".

    Raises:
        ModelLoadError: the model has layers that the paged cache cannot hold, or does not run at all.
    """
    name, text_config = type(model).__name__, model.config.get_text_config(decoder=True)
    unknown = set(getattr(text_config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise ModelLoadError(f"{name} has layers of type {', '.join(sorted(unknown))}: not supported")
    probe = LayerProbe()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=token, position_ids=token, use_cache=False, paged=probe)
    except ModelLoadError:
        raise
    except Exception as error:  # the model's own code, over a config that nobody has proved: anything may come
        detail = " ".join(str(error).split())
        raise ModelLoadError(
            f"{name} does not run as its config says ({_sizes(text_config)}): {detail}; correct config.json"
        ) from error
    num_layers = text_config.num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        raise ModelLoadError(
            f"{name}: attention seen in {len(probe.layers)} of {num_layers} layers; "
            "only models whose every layer has attention with keys and values can run on the paged cache"
        )
    return [probe.layers[index] for index in range(num_layers)]


def _sizes(config: PreTrainedConfig) -> str:
    stated = {name: getattr(config, name, None) for name in _SIZES}
    return ", ".join(f"{name}={size}" for name, size in stated.items() if size is not None)
