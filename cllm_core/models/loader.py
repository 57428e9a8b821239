"""Loads what the settings name: find it, check it, read it, merge the adapter, describe it. Called once per worker."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.info import TokenizerBundle
from cllm_core.models.adapter import cast_weights, merge_adapter
from cllm_core.models.architecture import check_architecture
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.checkpoint import (
    Checkpoint,
    has_tokenizer,
    is_multimodal,
    read_config,
    read_tokenizer,
    read_weights,
    stored_dtype,
)
from cllm_core.models.divided import require_divisible
from cllm_core.models.end_tokens import find_eos_token_ids
from cllm_core.models.own_attention import has_own_attention, teach_paging
from cllm_core.models.placement import choose_device, choose_dtype
from cllm_core.models.progress import OnProgress
from cllm_core.models.proven import find_gap
from cllm_core.models.ropes import fix_ropes, longest_context, stated_context
from cllm_core.models.sampling_defaults import read_sampling_defaults
from cllm_core.models.self_check import require_equal
from cllm_core.models.source import ModelSource, resolve_source
from cllm_core.models.text_part import leave_out_other_parts
from cllm_core.models.tokenizer import build_bundle
from cllm_core.request import SamplingDefaults

logger = logging.getLogger(__name__)

_FETCHING_SHARE = 0.4  # of the progress bar; reading takes most of the rest


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what is known about it.

    Attributes:
        model: in eval mode on `device`; no parameter requires a gradient.
        tokenizer: for the process that handles text.
        eos_token_ids: ascending; any of them ends an output. Empty where the checkpoint names none.
        name: what the user named, or the default's name.
        block_length: Jacobi block length n of cllm.json in tokens, None where it says none.
        domain: what the model was trained for (cllm.json), None for a plain model.
        max_model_len: longest prompt + output that the model was built for, in tokens.
        device: of all weights.
        dtype: of the weights as they are loaded; a backend may compute in another one.
        unproven: why the tests say nothing about the model, None where they compare it with transformers.
        sampling_defaults: of its generation_config.json or GGUF file.
        gated_adapter: folder of the one that was named as the model, or came with it in Uno's layout; None for none.
    """

    model: PreTrainedModel
    tokenizer: TokenizerBundle
    eos_token_ids: tuple[int, ...]
    name: str
    block_length: int | None
    domain: str | None
    max_model_len: int
    device: torch.device
    dtype: torch.dtype
    unproven: str | None = None
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    gated_adapter: Path | None = None


def load_model(
    config: EngineConfig,
    on_progress: OnProgress,
    *,
    attn_implementation: str = PAGED_ATTENTION,
    kernels_take_bfloat16: bool = False,
) -> LoadedModel:
    """Load the model, adapter and tokenizer that `config` names.

    Args:
        config: its model, adapter, revision, dtype, device, trust_remote_code and skip_self_check are used; with
            max_model_len, ropes that follow the length of a text are fixed for it.
        on_progress: called with the stage and the fraction of the whole load.
        attn_implementation: transformers' name of the attention function.
        kernels_take_bfloat16: as in choose_dtype.

    Raises:
        ModelLoadError: something is missing, damaged, does not fit together, cannot be served or would be served wrong.
    """
    if attn_implementation == PAGED_ATTENTION:
        register_paged_attention()
    device = choose_device(config.device)
    source = resolve_source(config, lambda stage, fraction: on_progress(stage, _FETCHING_SHARE * fraction))
    model_config = read_config(source.checkpoint)
    check_architecture(source.checkpoint, model_config, attention=attn_implementation)
    on_progress("loading the tokenizer", _FETCHING_SHARE)
    tokenizer = read_tokenizer(tokenizer_source(source), model_config)
    bundle = build_bundle(tokenizer, model_name=source.name, chat_template=config.chat_template)
    stored = stored_dtype(source.checkpoint, model_config)
    dtype = choose_dtype(config.dtype, stored, device, kernels_take_bfloat16=kernels_take_bfloat16)
    if config.tensor_parallel_size > 1:
        require_divisible(source, model_config, config.tensor_parallel_size)
    model = read_model(
        source,
        model_config,
        dtype,
        device,
        attention=attn_implementation,
        on_progress=on_progress,
        num_parts=config.tensor_parallel_size,
    )
    max_model_len = _max_model_len(source, model_config, config.max_model_len)
    fix_ropes(model, config.max_model_len or max_model_len)
    unproven = find_gap(model, source.checkpoint)
    if attn_implementation == PAGED_ATTENTION and unproven is not None and not config.skip_self_check:
        on_progress("comparing with transformers", 0.9)
        _compare_with_transformers(model, unproven, name=source.name, max_model_len=max_model_len)
    on_progress("model loaded", 1.0)
    logger.info("loaded %s (%s) as %s on %s", source.name, type(model).__name__, dtype, device)
    return LoadedModel(
        model=model,
        tokenizer=bundle,
        eos_token_ids=find_eos_token_ids(source.checkpoint, model.config, tokenizer),
        name=source.name,
        block_length=source.card.block_length if source.card else None,
        domain=source.card.domain if source.card else None,
        max_model_len=max_model_len,
        device=device,
        dtype=dtype,
        sampling_defaults=read_sampling_defaults(source.checkpoint),
        unproven=unproven,
        gated_adapter=source.gated_adapter,
    )


def read_model(
    source: ModelSource,
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str,
    on_progress: OnProgress,
    num_parts: int = 1,
) -> PreTrainedModel:
    """The weights in eval mode, adapter merged. The merge runs on the CPU: in float32 the base may not fit the device.

    Args:
        source: from `resolve_source`.
        model_config: of its checkpoint.
        dtype, device: of the weights returned.
        attention: transformers' name of the attention function.
        on_progress: called with the stage and the fraction of the whole load.
        num_parts: as in `read_weights`.

    Raises:
        ModelLoadError: weights or adapter are damaged or do not fit together.
    """
    on_progress("reading weights", _FETCHING_SHARE + 0.1)
    if source.adapter is None:
        model = read_weights(
            source.checkpoint, model_config, dtype=dtype, device=device, attention=attention, num_parts=num_parts
        )
    else:
        _require_mergeable(source, model_config)
        cpu = torch.device("cpu")
        base = read_weights(source.checkpoint, model_config, dtype=torch.float32, device=cpu, attention=attention)
        on_progress("merging adapter", 0.8)
        model = merge_adapter(base, source.adapter, base_name=source.base_name)
        cast_weights(model, dtype)
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.requires_grad_(False)
    model.eval()
    if has_own_attention(type(model)):
        teach_paging(model)
    if is_multimodal(model_config):
        leave_out_other_parts(model)
    return model


def _compare_with_transformers(model: PreTrainedModel, reason: str, *, name: str, max_model_len: int) -> None:
    """The self-check of a model that the tests do not prove."""
    started = time.perf_counter()
    require_equal(model, name=name, max_model_len=max_model_len)
    seconds = time.perf_counter() - started
    logger.info("%s equals transformers, compared in %.1f s: %s", type(model).__name__, seconds, reason)


def _require_mergeable(source: ModelSource, model_config: PreTrainedConfig) -> None:
    if source.checkpoint.gguf_file is None and getattr(model_config, "quantization_config", None) is not None:
        raise ModelLoadError(
            f"{source.base_name}: has quantised weights, which an adapter cannot be merged into; "
            "name the unquantised base as model"
        )


def tokenizer_source(source: ModelSource) -> Checkpoint:
    """An adapter may bring a tokenizer, with the chat template it was trained with; it wins over the base's."""
    if source.adapter is not None and has_tokenizer(source.adapter):
        return Checkpoint(source.adapter, trust_remote_code=source.checkpoint.trust_remote_code)
    return source.checkpoint


def _max_model_len(source: ModelSource, model_config: PreTrainedConfig, requested: int | None) -> int:
    """What the config states; more on request, as far as the rope of the model is stretched."""
    text_config = model_config.get_text_config(decoder=True)
    stated = stated_context(text_config) or requested
    if stated is None:
        raise ModelLoadError(f"{source.name}: its config states no context length; set max_model_len")
    longest = longest_context(text_config) or stated
    return min(max(stated, requested or stated), longest)
