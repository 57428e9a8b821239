"""Loads a model, compares it with transformers on longer texts than at load, and tells how it would be served."""

from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from cllm_core.backends.choose import kernels_take_bfloat16, prepare_model
from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.info import ComputePaths
from cllm_core.models.check_rows import CheckTexts, run_rows
from cllm_core.models.loader import LoadedModel, load_model
from cllm_core.models.progress import OnProgress
from cllm_core.models.proven import rope_names
from cllm_core.models.self_check import Difference, compare_with_transformers, reference_logprobs

# Another order of additions rounds otherwise, not much more; and in float32 nothing is left to compare it with.
_MOST_TIMES_TRANSFORMERS, _LEAST_ERROR = 2.0, 1e-3


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far the log-probabilities in the model's own precision are from those in float32, on average over all tokens.

    Attributes:
        served: of what this machine's backend computes, in nats.
        transformers: of what transformers computes, in nats.
        is_quantised: whether the backend rounded the weights further, as the settings asked for.
    """

    served: float
    transformers: float
    is_quantised: bool

    @property
    def is_usual(self) -> bool:
        """Whether the backend rounds about as transformers does, or is asked to round more."""
        return self.is_quantised or self.served <= _MOST_TIMES_TRANSFORMERS * self.transformers + _LEAST_ERROR


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found.

    Attributes:
        loaded: the model; its layers may have been replaced since.
        ropes: types of its rotary embeddings, "" for none.
        num_tokens: of each text that was compared.
        on_cache: transformers' layers on the paged cache against transformers without one.
        rounding: of what is served, in the precision that the backend computes in.
        dtype: that precision.
        paths: what computes which part.
    """

    loaded: LoadedModel
    ropes: tuple[str, ...]
    num_tokens: int
    on_cache: Difference
    rounding: Rounding
    dtype: torch.dtype
    paths: ComputePaths

    @property
    def is_right(self) -> bool:
        """Whether the model is served as transformers computes it."""
        return self.on_cache.is_rounding and self.rounding.is_usual


def check_model(config: EngineConfig, *, num_tokens: int, on_progress: OnProgress) -> CheckReport:
    """Load and compare.

    Args:
        config: what to load, and how to run it.
        num_tokens: of each text; fewer where the model has fewer positions.
        on_progress: called with the stage and the fraction of the whole load.

    Raises:
        ConfigError: the settings do not fit the model.
        ModelLoadError: the model cannot be loaded or run.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    unchecked = replace(config, skip_self_check=True)
    loaded = load_model(unchecked, on_progress, kernels_take_bfloat16=kernels_take_bfloat16(config))
    model, ropes = loaded.model, rope_names(loaded.model)
    texts = CheckTexts.draw(model, min(num_tokens, config.max_model_len or loaded.max_model_len))
    on_progress("comparing with transformers", 1.0)
    on_cache, expected = compare_with_transformers(model, texts)
    transformers = float((reference_logprobs(model, texts) - expected).nan_to_num().abs().mean())
    on_progress("comparing what is served", 1.0)
    prepared = prepare_model(config, model)
    served = _mean_difference(prepared, texts, expected, block_size=config.cache_block_size)
    rounding = Rounding(served, transformers, is_quantised=config.quantization is not None)
    return CheckReport(loaded, ropes, texts.num_tokens, on_cache, rounding, prepared.dtype, prepared.paths)


def _mean_difference(prepared: PagedModel, texts: CheckTexts, expected: Tensor, *, block_size: int) -> float:
    """How far what the backend computes is from `expected`, in nats on average over all tokens."""
    prepared.allocate_cache(num_blocks=texts.num_blocks(block_size), block_size=block_size)
    rows = run_rows(prepared.forward, texts, block_size=block_size)
    distances = [logprobs - expected[row.text, row.scored(texts)] for row, logprobs in rows]
    return float(torch.cat(distances).nan_to_num().abs().mean())


def render(report: CheckReport) -> str:
    """The report, a line for each of its facts."""
    loaded, paths, rounding = report.loaded, report.paths, report.rounding
    proof = f"say nothing: {loaded.unproven}" if loaded.unproven else "compare this architecture and rope"
    facts = {
        "model": f"{loaded.name}: {type(loaded.model).__name__}, {_dtype_name(report.dtype)} on {loaded.device}",
        "rope": ", ".join(name or "none" for name in report.ropes),
        "context": f"{loaded.max_model_len} tokens",
        "end tokens": ", ".join(map(str, loaded.eos_token_ids)) or "none: outputs end at their limit",
        "chat template": "none" if loaded.tokenizer.chat_template is None else "yes",
        "tests": proof,
        "paged cache": f"{_verdict(report.on_cache.is_rounding)}: off by {report.on_cache} "
        f"(float32, texts of {report.num_tokens} tokens)",
        "as served": f"{_verdict(rounding.is_usual)}: off by {rounding.served:.2g} nats on average, "
        f"transformers in {_dtype_name(loaded.dtype)} by {rounding.transformers:.2g}",
        **{name.replace("_", " "): str(getattr(paths, name)) for name in paths.__struct_fields__},
    }
    width = max(map(len, facts))
    return "".join(f"{name:<{width}}  {fact}\n" for name, fact in facts.items())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _verdict(is_equal: bool) -> str:
    return "equal" if is_equal else "DIFFERS"
