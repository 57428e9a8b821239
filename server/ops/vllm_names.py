"""The same series under vLLM's names, for dashboards, autoscalers and gateways that were made for its servers."""

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cllm_core.errors import EngineUnavailable
from cllm_core.worker.engine_client import EngineClient

from ..served_models import ModelRegistry

VLLM_NAMES: Mapping[str, str] = {
    "vllm:num_requests_running": "cllm_requests_running",
    "vllm:num_requests_waiting": "cllm_requests_waiting",
    "vllm:kv_cache_usage_perc": "cllm_cache_usage_ratio",
    "vllm:gpu_cache_usage_perc": "cllm_cache_usage_ratio",  # its name in older releases
    "vllm:prompt_tokens": "cllm_prompt_tokens",
    "vllm:generation_tokens": "cllm_completion_tokens",
    "vllm:prefix_cache_queries": "cllm_prompt_tokens",
    "vllm:prefix_cache_hits": "cllm_cached_prompt_tokens",
    "vllm:num_preemptions": "cllm_preemptions",
    "vllm:request_success": "cllm_outputs",
    "vllm:time_to_first_token_seconds": "cllm_time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "cllm_inter_chunk_seconds",
    "vllm:e2e_request_latency_seconds": "cllm_generation_seconds",
    "vllm:request_queue_time_seconds": "cllm_queue_seconds",
    "vllm:request_prefill_time_seconds": "cllm_prefill_seconds",
    "vllm:request_decode_time_seconds": "cllm_decode_seconds",
    "vllm:request_prompt_tokens": "cllm_prompt_length_tokens",
    "vllm:request_generation_tokens": "cllm_output_length_tokens",
}
"""Our series by vLLM's names, without the suffix of counters."""

_LABELS = {"model": "model_name", "reason": "finished_reason"}
_ENGINE = {"engine": "0"}


class VllmCollector(Collector):
    """Repeats series of a registry under vLLM's names, and adds what only those have.

    Args:
        registry: with ours.
        engine: for what describes it.
        models: for their names.
    """

    def __init__(self, registry: CollectorRegistry, engine: EngineClient, models: ModelRegistry) -> None:
        self._registry = registry
        self._engine = engine
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """Every series that there is now."""
        families = {family.name: family for family in self._registry.collect()}
        for name, own in VLLM_NAMES.items():
            yield _renamed(families[own], name)
        yield from self._about_engine()

    def _about_engine(self) -> Iterable[Metric]:
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Size of the KV cache.",
            labels=["model_name", "engine", "block_size", "num_gpu_blocks"],
        )
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with running requests; the value is the time.",
            labels=["model_name", "engine", "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        try:
            info = self._engine.info
        except EngineUnavailable:
            pass
        else:
            name = self._models.name_or_empty
            cache.add_metric([name, "0", str(info.cache_block_size), str(info.num_cache_blocks)], 1.0)
            running = sorted(set(self._engine.stats.adapter_per_row) - {""})
            adapters.add_metric([name, "0", str(len(info.adapters)), ",".join(running), ""], time.time())
        yield cache
        yield adapters


def _renamed(family: Metric, name: str) -> Metric:
    renamed = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {_LABELS.get(label, label): value for label, value in sample.labels.items()} | _ENGINE
        renamed.add_sample(name + sample.name.removeprefix(family.name), labels, sample.value)
    return renamed
