"""What each layer of a model asks of cache and attention, seen by running one token through it.

The first run of a model that was just read: what its classes and its config do not agree on shows here. It runs under
an attention of its own, for which transformers makes masks: the window of a layer's mask has to be the one that the
layer tells its attention, as masks are all that transformers' own attention goes by.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import attention_switched, paged_attention, step_attention
from cllm_core.models.paged import LayerProbe, LayerSpec

_PROBE_ATTENTION = "cllm_probe"
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
    run_one_token(model, probe)
    num_layers = text_config.num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        raise ModelLoadError(
            f"{name}: attention seen in {len(probe.layers)} of {num_layers} layers; "
            "only models whose every layer has attention with keys and values can run on the paged cache"
        )
    return [probe.layers[index] for index in range(num_layers)]


def run_one_token(model: PreTrainedModel, probe: LayerProbe) -> None:
    """Let the probe see one token's way through the model.

    Raises:
        ModelLoadError: attention is of a kind that the paged cache does not know, or the model does not run at all.
    """
    AttentionInterface.register(_PROBE_ATTENTION, _probe_attention)
    AttentionMaskInterface.register(_PROBE_ATTENTION, _probe_mask)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with attention_switched(model, _PROBE_ATTENTION), torch.inference_mode(), step_attention(probe):
            model(input_ids=token, position_ids=token, use_cache=False, paged=probe)
    except ModelLoadError:
        raise
    except Exception as error:  # the model's own code, over a config that nobody has proved: anything may come
        detail = " ".join(str(error).split())
        sizes = _sizes(model.config.get_text_config(decoder=True))
        raise ModelLoadError(
            f"{type(model).__name__} does not run as its config says ({sizes}): {detail}; correct config.json"
        ) from error


def _probe_mask(*, local_size: int | None = None, **_: Any) -> Tensor:
    """In place of a mask [1, 1, 1, 1], the number of tokens that it leaves visible; 0 for all."""
    return torch.full((1, 1, 1, 1), float(local_size or 0))


def _probe_attention(  # noqa: PLR0917 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        _require_told_window(module, attention_mask, kwargs.get("sliding_window"))
    return paged_attention(module, query, key, value, None, scaling, dropout, **kwargs)


def _require_told_window(module: nn.Module, mask: Tensor, told: int | None) -> None:
    """Raise ModelLoadError where a layer's mask, from `_probe_mask`, has another window than its attention is told."""
    name, masked = type(module).__name__, float(mask.flatten()[0]) if mask.numel() == 1 else -1.0
    if masked < 0 or masked != int(masked):
        raise ModelLoadError(f"{name} brings an attention mask of its own, which is not supported")
    context = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    windows = [int(masked), told or 0]
    if context is not None:  # a window that no text fills is none
        windows = [0 if window >= context else window for window in windows]
    if windows[0] != windows[1]:
        raise ModelLoadError(
            f"{name} masks a window of {windows[0] or 'all'} tokens and tells its attention {windows[1] or 'all'}: "
            "which of them holds is unclear, so it is not supported"
        )


def _sizes(config: PreTrainedConfig) -> str:
    stated = {name: getattr(config, name, None) for name in _SIZES}
    return ", ".join(f"{name}={size}" for name, size in stated.items() if size is not None)
