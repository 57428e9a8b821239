"""Settings of the engine: frozen, refused where they are built, and sent to the worker process as JSON.

No torch in here: the API process reads this module too.
"""

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from cllm_core.errors import ConfigError

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cuda", "cpu"]
QuantizationName = Literal["int8"]
GenerationConfigChoice = Literal["auto", "none"]
CpuIsaName = Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "neon"]
GatedForm = Literal["noise", "tail", "jacobi", "two_pass"]

DEFAULT_BLOCK_LENGTH = 16
MAX_BLOCK_LENGTH = 256
MAX_STREAM_INTERVAL = 1.0

DRAFTERS = ("own", "copy", "suffix", "pool")
"""Sources of drafts, as users name them."""

DRAFTERS_WITH_PATH: tuple[str, ...] = ()
"""Sources that are loaded from somewhere, written NAME:PATH."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to load and how to run it. None means "chosen at load"; the choice is reported in ModelInfo.

    Attributes:
        model: Hub id, folder, .gguf file or built-in name; None is what the adapter stands on, else cllm-chat, or its
            base SmolLM2-135M-Instruct where adapters are served beside the model.
        adapter: PEFT adapter (folder or Hub id) merged into the weights at load.
        adapters: LoRA adapters (folder or Hub id) by name, served beside the base from one set of its weights.
        adapter_root: folder below which further adapters may be loaded while serving; None refuses to.
        gated_adapter: LoRA adapter (folder or Hub id) that proposes what the model then verifies: texts stay its own.
            None takes the one in the model's folder where there is one (Uno's layout), "none" takes none.
        gated_form: what the rows that propose read. noise: random tokens behind the lengths that may be accepted, in
            the pass that verifies; tail: the same, but reading the last window's predictions as far as they go; jacobi:
            the draft itself; two_pass: noise in a pass of its own, as Uno.
        gated_rows: most rows of a block that proposes; None takes what the adapter was trained for.
        max_adapters: adapters held at once, those of `adapters` included.
        max_adapter_rank: highest LoRA rank of an adapter served beside the base.
        chat_template: name of a common chat template (chatml, llama3, ...) or path of a Jinja file, for models that
            bring none or a wrong one; None takes the model's own. Adapters that bring one keep theirs.
        revision: Hub revision (branch, tag or commit) of the model.
        dtype: of weights and KV cache; auto takes the checkpoint's, or float32 where that is not computed at speed.
        device: auto takes cuda where there is one.
        quantization: int8 rounds the weights to 8 bits at load, and the inputs of their products in every step (CPUs
            whose layers the C kernels compute); None keeps them as dtype says.
        block_length: Jacobi block length n in tokens (1 is AR); None takes the checkpoint's cllm.json, else 16.
        drafters: sources of drafts, those with a path as NAME:PATH; the first where nothing tells them apart.
        suffix_memory_mib: memory for past outputs, which the source suffix proposes from, in MiB.
        adaptive_block_length: choose each window's length, up to the block length, by load and recent acceptance;
            False always drafts the whole block.
        max_model_len: longest prompt + output in tokens; None takes the model's own limit, cut to the KV cache.
        max_num_seqs: requests decoded together.
        max_waiting: requests that may wait beyond those running; more are refused as busy.
        max_batched_tokens: token budget of one step, shared by prompt chunks and Jacobi rows.
        prefill_step_seconds: longest step that a prompt chunk may make while other requests stream, by measured step
            times; a step may always take twice what it would without the chunk. 0: only max_batched_tokens limits it.
        cache_block_size: tokens in one block of the KV cache.
        num_cache_blocks: blocks of the KV cache; None sizes it from cache_memory_gib or free memory.
        cache_memory_gib: memory of the KV cache in GiB; None takes a share of free memory.
        gpu_memory_utilization: share of the GPU's memory that weights, activations and cache may use together.
        step_timeout: seconds after which a step, other than the first ones, counts as hung and the worker is replaced;
            None takes twenty times the expected time of the step, at least 1.5 s, and 0 sets no limit.
        queue_timeout: seconds that a request may wait to be begun; None sets no limit.
        stream_interval: seconds that accepted tokens, but a request's first, may wait to be sent with those of the
            next steps, as every message takes time from the cores that compute; 0 sends them after every step.
        prefix_caching: share KV blocks of equal prompt prefixes.
        generation_config: auto takes defaults of sampling from the checkpoint (generation_config.json, or a GGUF
            file's keys), none does not.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        skip_self_check: serve models of an architecture that no test knows without comparing them with transformers.
        native_kernels: compute by the C kernels where they cover the model (CPU, bfloat16).
        cpu_isa: instruction set that the C kernels use; auto takes the best that the processor has.
        cuda_graphs: capture steps as CUDA graphs, which launch faster and take some memory (CUDA).
        num_threads: CPU threads of torch; None leaves torch's choice.
        tensor_parallel_size: devices of this machine that the model is divided among; on CPUs, processes.
    """

    model: str | None = None
    adapter: str | None = None
    adapters: dict[str, str] = {}
    adapter_root: str | None = None
    gated_adapter: str | None = None
    gated_form: GatedForm = "noise"
    gated_rows: int | None = None
    max_adapters: int = 8
    max_adapter_rank: int = 64
    chat_template: str | None = None
    revision: str | None = None
    dtype: DTypeName = "auto"
    device: DeviceName = "auto"
    quantization: QuantizationName | None = None
    block_length: int | None = None
    drafters: tuple[str, ...] = ("own", "copy")
    suffix_memory_mib: int = 16
    adaptive_block_length: bool = True
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_waiting: int = 256
    max_batched_tokens: int = 1024
    prefill_step_seconds: float = 0.05
    cache_block_size: int = 16
    num_cache_blocks: int | None = None
    cache_memory_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    step_timeout: float | None = None
    queue_timeout: float | None = None
    stream_interval: float = 0.02
    prefix_caching: bool = True
    generation_config: GenerationConfigChoice = "auto"
    trust_remote_code: bool = False
    skip_self_check: bool = False
    native_kernels: bool = True
    cpu_isa: CpuIsaName = "auto"
    cuda_graphs: bool = True
    num_threads: int | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        _require_range("block_length", self.block_length, 1, MAX_BLOCK_LENGTH, "1 is plain AR decoding")
        _require_range("max_model_len", self.max_model_len, 2, None, "give the context length in tokens")
        _require_range("max_num_seqs", self.max_num_seqs, 1, 4096, "give the number of requests decoded together")
        _require_range("max_waiting", self.max_waiting, 0, None, "0 refuses whatever cannot start at once")
        _require_range(
            "max_batched_tokens",
            self.max_batched_tokens,
            self.max_num_seqs,
            None,
            "every running request needs one token a step, so give at least max_num_seqs",
        )
        _require_range("cache_block_size", self.cache_block_size, 1, 1024, "16 suits most models")
        _require_range("num_cache_blocks", self.num_cache_blocks, 1, None, "leave it out to size it from memory")
        _require_range("num_threads", self.num_threads, 1, None, "leave it out for torch's choice")
        _require_range("max_adapter_rank", self.max_adapter_rank, 1, None, "64 holds most adapters")
        _require_range("gated_rows", self.gated_rows, 1, MAX_BLOCK_LENGTH, "3 to 7 suit most adapters")
        num_adapters = len(self.adapters)
        _require_range("max_adapters", self.max_adapters, num_adapters, None, f"{num_adapters} are named in adapters")
        for name in self.adapters:
            check_adapter_name(name)
        if self.adapter is not None and self.adapters:
            raise ConfigError(
                f"adapter={self.adapter!r}: cannot be merged where adapters ({', '.join(self.adapters)}) are served "
                "beside the base; give it a name too"
            )
        check_drafters(self.drafters)
        _require_range("suffix_memory_mib", self.suffix_memory_mib, 1, None, "16 hold some 460,000 tokens")
        self._check_quantization()
        self._check_tensor_parallel()
        if self.cpu_isa != "auto" and not self.native_kernels:
            raise ConfigError(
                f"cpu_isa={self.cpu_isa!r}: the C kernels use it, and native_kernels is off; leave out one of them"
            )
        if self.cache_memory_gib is not None and not self.cache_memory_gib > 0:
            raise ConfigError(f"cache_memory_gib={self.cache_memory_gib}: must be > 0 GiB")
        if not 0 <= self.stream_interval <= MAX_STREAM_INTERVAL:
            raise ConfigError(
                f"stream_interval={self.stream_interval}: must lie in [0, {MAX_STREAM_INTERVAL}] seconds; 0 sends "
                "tokens after every step"
            )
        if self.step_timeout is not None and not self.step_timeout >= 0:
            raise ConfigError(f"step_timeout={self.step_timeout}: must be >= 0 seconds; 0 sets no limit")
        if self.queue_timeout is not None and not self.queue_timeout > 0:
            raise ConfigError(f"queue_timeout={self.queue_timeout}: must be > 0 seconds; leave it out for no limit")
        if not 0 <= self.prefill_step_seconds < float("inf"):
            raise ConfigError(
                f"prefill_step_seconds={self.prefill_step_seconds}: must be >= 0 seconds; 0 sets no limit"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization}: must lie in (0, 1]")

    def _check_tensor_parallel(self) -> None:
        size = self.tensor_parallel_size
        _require_range("tensor_parallel_size", size, 1, 64, "1 keeps the model on one device")
        if size == 1:
            return
        is_gated = self.gated_adapter not in (None, "none")
        if self.adapter is not None or self.adapters or self.adapter_root is not None or is_gated:
            raise ConfigError(
                f"tensor_parallel_size={size}: adapters cannot be divided; merge one with cllm export and serve that"
            )
        if self.quantization is not None:
            raise ConfigError(
                f"tensor_parallel_size={size}: quantization={self.quantization!r} is not divided; leave out one of them"
            )

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        refused = {
            "device": (self.device == "cuda", "it is for CPUs"),
            "dtype": (self.dtype in ("float32", "float16"), "what is not rounded to 8 bits is bfloat16"),
            "native_kernels": (not self.native_kernels, "the C kernels compute it"),
        }
        for field, (is_refused, reason) in refused.items():
            if is_refused:
                raise ConfigError(
                    f"quantization={self.quantization!r}: does not go with {field}={getattr(self, field)!r}, "
                    f"as {reason}; leave out one of them"
                )


def check_adapter_name(name: str) -> None:
    """Raise ConfigError unless an adapter may be served under this name."""
    if not _ADAPTER_NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {name!r}: must be 1 to 128 letters, digits or any of . _ : / -, the first a letter or digit"
        )


def check_drafters(drafters: Sequence[str]) -> None:
    """Raise ConfigError unless these are sources of drafts, each named once."""
    known = ", ".join((*DRAFTERS, *(f"{name}:PATH" for name in DRAFTERS_WITH_PATH)))
    if not drafters:
        raise ConfigError(f"drafters: names none; give some of {known} (block_length 1 drafts nothing)")
    names = [drafter.partition(":")[0] for drafter in drafters]
    for drafter, name in zip(drafters, names, strict=True):
        _, colon, path = drafter.partition(":")
        if not (drafter in DRAFTERS or (name in DRAFTERS_WITH_PATH and colon and path)):
            raise ConfigError(f"drafters: {drafter!r} is unknown; give some of {known}")
        if names.count(name) > 1:
            raise ConfigError(f"drafters: {name!r} is given twice; leave out one of them")


def _require_range(field: str, value: int | None, low: int, high: int | None, remedy: str) -> None:
    if value is None:
        return
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in {low}..{high}"
        raise ConfigError(f"{field}={value}: must be {bounds}; {remedy}")
