"""Makes an Engine from settings: load, size the cache, resolve the limits."""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.backends.choose import kernels_take_bfloat16, prepare_model
from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import DEFAULT_BLOCK_LENGTH, EngineConfig
from cllm_core.engine.adapters import ServedAdapters
from cllm_core.engine.drafters.drafting import Drafting
from cllm_core.engine.drafters.gated import GatedProposals
from cllm_core.engine.drafters.registry import Target, make_drafters
from cllm_core.engine.engine import Engine
from cllm_core.engine.memory import num_cache_blocks, step_bytes
from cllm_core.engine.runner import ModelRunner
from cllm_core.engine.step_times import StepTimes
from cllm_core.errors import ConfigError
from cllm_core.info import AdapterInfo, DrafterInfo, GatedInfo, ModelInfo
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.adapter_store import AdapterStore
from cllm_core.models.attention import register_paged_attention
from cllm_core.models.gated_adapter import GatedAdapter, find_gated_adapter, load_gated_adapter
from cllm_core.models.loader import LoadedModel, load_model
from cllm_core.models.paged import RowSpan
from cllm_core.models.source import locate_adapter
from cllm_core.parallel.followers import Followers
from cllm_core.request import SamplingDefaults

logger = logging.getLogger(__name__)

# Up to here a device goes from being bound by reading weights to being bound by arithmetic; beyond, time is linear.
_LONGEST_TIMED_STEP = 128
_NUM_TIMINGS = 3

ProgressCallback = Callable[[str, float], None]


def build_engine(config: EngineConfig, on_progress: ProgressCallback | None = None) -> Engine:
    """Load a model and make an engine of it.

    Args:
        config: what to load and the limits; None values are resolved here and reported in `Engine.info`.
        on_progress: called with (stage, fraction of the whole in 0..1).

    Raises:
        ModelLoadError: the checkpoint cannot be loaded or run.
        ConfigError: the limits do not fit each other or the memory.
    """
    report = on_progress or (lambda stage, fraction: None)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.tensor_parallel_size == 1:
        return _build(config, report)
    followers = Followers(config)
    try:
        return _build(config, report, followers)
    except BaseException:
        followers.close()
        raise


def _build(config: EngineConfig, report: ProgressCallback, followers: Followers | None = None) -> Engine:
    register_paged_attention()
    loaded = load_model(
        config,
        on_progress=lambda stage, fraction: report(stage, 0.9 * fraction),
        kernels_take_bfloat16=kernels_take_bfloat16(config),
    )
    return assemble_engine(config, loaded, report, followers)


def assemble_engine(
    config: EngineConfig, loaded: LoadedModel, report: ProgressCallback, followers: Followers | None = None
) -> Engine:
    """Make an engine of a model in memory, loaded with attn_implementation="cllm_paged"; errors as build_engine.

    Args:
        config: as build_engine.
        loaded: the model, or the part of this rank where it is divided.
        report: called with the progress.
        followers: the other ranks, None where there are none.
    """
    # Counted before a backend takes parameters out of the model.
    num_parameters, weight_bytes = _count_parameters(loaded.model)
    gated_path = find_gated_adapter(config, loaded)
    is_served = bool(config.adapters) or config.adapter_root is not None
    bank = AdapterBank(loaded.model) if is_served or gated_path is not None else None
    model = prepare_model(config, loaded.model, bank)
    if followers is not None:
        model.lead(followers)
    adapters = _load_adapters(config, loaded, bank, report) if bank is not None and is_served else None
    gated = None if bank is None or gated_path is None else _load_gated(gated_path, config, loaded, bank, report)
    drafters = make_drafters(Target(config, loaded, model))
    report("allocating the KV cache", 0.92)
    wanted_len = _wanted_model_len(config, loaded)
    num_blocks = num_cache_blocks(
        config,
        bytes_per_token=model.cache_bytes_per_token,
        max_model_len=wanted_len,
        device=model.device,
        step_bytes=step_bytes(model, config, wanted_len) if model.device.type == "cuda" else 0,
        reserved_bytes=_later_adapter_bytes(config, bank),
    )
    max_model_len = _resolve_max_model_len(config, loaded, num_blocks)
    cache_bytes = model.allocate_cache(num_blocks=num_blocks, block_size=config.cache_block_size)
    model.enable_graphs(max_model_len=max_model_len)
    info = _describe(
        config,
        loaded,
        model,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes - model.saved_bytes,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        cache_bytes=cache_bytes,
        adapters=() if adapters is None else adapters.infos,
        drafters=tuple(made.info for made in drafters),
        gated=None if gated is None else gated.info,
    )
    proposals = None if gated is None else GatedProposals(gated.noise_ids, gated.info.num_bytes)
    runner = ModelRunner(
        model,
        max_model_len=max_model_len,
        drafting=Drafting([made.drafter for made in drafters], proposals),
        sampling=model.sampling,
        num_graphs=lambda: model.num_graphs,
        may_capture=lambda: model.may_capture,
    )
    step_times = None
    if config.adaptive_block_length or config.prefill_step_seconds:
        report("measuring step times", 0.95)
        step_times = measure_step_times(model, config, max_model_len)
    report("ready", 1.0)
    return Engine(config, info, runner, step_times, adapters)


def _load_adapters(
    config: EngineConfig, loaded: LoadedModel, bank: AdapterBank, report: ProgressCallback
) -> ServedAdapters:
    """The adapters that the settings name."""
    if loaded.name in config.adapters:
        raise ConfigError(f"adapters: {loaded.name!r} is the name of the base model; choose another for the adapter")
    adapters = ServedAdapters(AdapterStore(bank, loaded, config), max_adapters=config.max_adapters)
    for name, path in config.adapters.items():
        report(f"loading adapter {name}", 0.9)
        folder = locate_adapter(path, config, lambda stage, _: report(stage, 0.9))
        adapters.load(name, path, folder)
        logger.info("adapter %s: %s", name, path)
    return adapters


def _load_gated(
    path: str, config: EngineConfig, loaded: LoadedModel, bank: AdapterBank, report: ProgressCallback
) -> GatedAdapter:
    report("loading the gated adapter", 0.9)
    gated = load_gated_adapter(path, config, loaded, bank, lambda stage, _: report(stage, 0.9))
    logger.info("gated adapter %s: form %s, blocks of up to %d rows", path, gated.info.form, gated.info.max_rows)
    return gated


def _later_adapter_bytes(config: EngineConfig, bank: AdapterBank | None) -> int:
    """Memory to leave for the adapters that may be loaded while serving."""
    if bank is None or config.adapter_root is None:
        return 0
    return (config.max_adapters - len(config.adapters)) * bank.max_bytes(config.max_adapter_rank)


def measure_step_times(model: PagedModel, config: EngineConfig, max_model_len: int) -> StepTimes:
    """Time steps of a few sizes; writes to the first blocks of the cache, which hold nothing yet.

    Args:
        model: with a cache for a text of max_model_len at least.
        config: the token budget of a step, and the cache's block size.
        max_model_len: longest text in tokens; a model may have no positions beyond it.
    """
    longest = min(_LONGEST_TIMED_STEP, config.max_batched_tokens, max_model_len)
    measured = {}
    for num_tokens in sorted({1, longest // 16, longest // 4, longest} - {0}):
        index = torch.arange(num_tokens, device=model.device)
        span = RowSpan(0, num_tokens, 0, tuple(range(-(-num_tokens // config.cache_block_size))))
        measured[num_tokens] = min(_time_step(model, index, span) for _ in range(_NUM_TIMINGS))
    return StepTimes(measured, config.max_batched_tokens)


def _time_step(model: PagedModel, index: Tensor, span: RowSpan) -> float:
    started = time.perf_counter()
    logits = model.forward(index, index, [span], index)
    logits.argmax(dim=-1).cpu()  # waits for the device
    return time.perf_counter() - started


def _wanted_model_len(config: EngineConfig, loaded: LoadedModel) -> int:
    if config.max_model_len is not None and config.max_model_len > loaded.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len}: the model was built for {loaded.max_model_len} tokens; lower it"
        )
    return config.max_model_len or loaded.max_model_len


def _resolve_max_model_len(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> int:
    num_cache_tokens = num_blocks * config.cache_block_size
    if config.max_model_len is None:
        return min(loaded.max_model_len, num_cache_tokens)
    if config.max_model_len > num_cache_tokens:
        raise ConfigError(
            f"max_model_len={config.max_model_len}: the KV cache holds {num_cache_tokens} tokens; "
            "lower it, or give the cache more memory (cache_memory_gib, num_cache_blocks)"
        )
    return config.max_model_len


def _count_parameters(causal_lm: PreTrainedModel) -> tuple[int, int]:
    """Number of the model's parameters, and their bytes."""
    parameters = list(causal_lm.parameters())
    return sum(parameter.numel() for parameter in parameters), sum(parameter.nbytes for parameter in parameters)


def _describe(
    config: EngineConfig,
    loaded: LoadedModel,
    model: PagedModel,
    *,
    num_parameters: int,
    weight_bytes: int,
    num_blocks: int,
    max_model_len: int,
    cache_bytes: int,
    adapters: tuple[AdapterInfo, ...],
    drafters: tuple[DrafterInfo, ...],
    gated: GatedInfo | None,
) -> ModelInfo:
    return ModelInfo(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        num_parameters=num_parameters,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        # Some checkpoints name end tokens that their own vocabulary lacks; they can never be chosen.
        eos_token_ids=tuple(i for i in loaded.eos_token_ids if i < model.vocab_size),
        vocab_size=model.vocab_size,
        block_length=config.block_length or loaded.block_length or DEFAULT_BLOCK_LENGTH,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        num_cache_blocks=num_blocks,
        cache_block_size=config.cache_block_size,
        cache_bytes=cache_bytes,
        weight_bytes=weight_bytes,
        quantization=config.quantization,
        domain=loaded.domain,
        tokenizer=loaded.tokenizer,
        adapters=adapters,
        drafters=drafters,
        gated=gated,
        sampling_defaults=_sampling_defaults(loaded, config),
        paths=model.paths,
    )


def _sampling_defaults(loaded: LoadedModel, config: EngineConfig) -> SamplingDefaults:
    if config.generation_config == "none":
        return SamplingDefaults()
    stated = [f"{name} {value}" for name, value in loaded.sampling_defaults.values().items()]
    if stated:
        logger.info("requests that say nothing else are sampled as the checkpoint has it: %s", ", ".join(stated))
    return loaded.sampling_defaults
