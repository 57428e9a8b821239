"""The settings of the engine: what to load and how to run it, for every command that runs a model.

They are those of `cllm_core.config.EngineConfig`, by the same names and with the same defaults. Flags and the CLLM_*
environment are made from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from cllm_core.config import (
    CpuIsaName,
    DeviceName,
    DTypeName,
    EngineConfig,
    GatedForm,
    GenerationConfigChoice,
    QuantizationName,
)
from cllm_core.errors import ConfigError

PanelName = Literal["Model", "Decoding", "Memory", "Server", "Limits", "Cluster"]

ENV_PREFIX = "CLLM_"


@dataclass(frozen=True, slots=True)
class Panel:
    """Names the heading under which `--help` shows a setting."""

    name: PanelName


MODEL = Panel("Model")
DECODING = Panel("Decoding")
MEMORY = Panel("Memory")
SERVER = Panel("Server")
LIMITS = Panel("Limits")
CLUSTER = Panel("Cluster")


def split_commas(value: object) -> object:
    """A tuple of the parts of one text or several; other values as they are."""
    given = [value] if isinstance(value, str) else value
    if isinstance(given, list):
        return tuple(part.strip() for text in given for part in text.split(",") if part.strip())
    return given


CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]


class EngineSettings(BaseSettings):
    """What to load and how to run it; refuses bad values where it is built (pydantic.ValidationError)."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, protected_namespaces=()
    )

    model: Annotated[
        str | None,
        MODEL,
        Field(
            description="Hub id, folder, .gguf file or built-in name. Left out: cllm-chat; with adapters beside it, "
            "its base SmolLM2-135M-Instruct."
        ),
    ] = None
    adapters: Annotated[
        CommaSeparated,
        MODEL,
        Field(
            description="NAME=ADAPTER: serve a LoRA adapter (folder, Hub id or built-in name) as a model of that name "
            "beside the base; give it again for more. A single one without NAME= is merged into the weights."
        ),
    ] = ()
    adapter_root: Annotated[
        str | None,
        MODEL,
        Field(
            description="Folder that clients may load further adapters from while the server runs; for trusted "
            "networks. Left out: they cannot, and the endpoints for it are off."
        ),
    ] = None
    gated_adapter: Annotated[
        str | None,
        MODEL,
        Field(
            description="LoRA adapter (folder or Hub id) that only proposes: the model verifies, so texts stay its own "
            "(docs/explanation/decoding.md). Left out: the one in the model's folder, where there is one. none: none."
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        MODEL,
        Field(
            description="Chat template to use instead of the model's own: alpaca, chatml, gemma, llama2, llama3, "
            "mistral, vicuna, zephyr, or the path of a Jinja file."
        ),
    ] = None
    revision: Annotated[str | None, MODEL, Field(description="Branch, tag or commit of the model on the Hub.")] = None
    dtype: Annotated[
        DTypeName, MODEL, Field(description="Number format of weights and KV cache. auto: the checkpoint's.")
    ] = "auto"
    device: Annotated[DeviceName, MODEL, Field(description="auto: CUDA where there is a GPU, else the CPU.")] = "auto"
    quantization: Annotated[
        QuantizationName | None,
        MODEL,
        Field(
            description="int8: round the weights to 8 bits at load, for faster steps and half the memory, at a small "
            "cost in quality (CPUs). Left out: they stay as dtype says."
        ),
    ] = None
    generation_config: Annotated[
        GenerationConfigChoice,
        MODEL,
        Field(
            description="auto: temperature, top_p, top_k, min_p, repetition_penalty and max_tokens that a request "
            "leaves out are those of the checkpoint's generation_config.json or GGUF file. none: it sets no defaults."
        ),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, MODEL, Field(description="Let transformers run code that comes with the checkpoint.")
    ] = False
    skip_self_check: Annotated[
        bool,
        MODEL,
        Field(
            description="Serve an architecture that the tests do not cover without comparing it with transformers "
            "at load (docs/reference/models.md)."
        ),
    ] = False
    native_kernels: Annotated[
        bool, MODEL, Field(description="Compute by the C kernels where they cover the model (CPU, bfloat16).")
    ] = True
    cpu_isa: Annotated[
        CpuIsaName,
        MODEL,
        Field(
            description="Instruction set that the C kernels use. auto: the best that the processor has; the log at the "
            "start names it."
        ),
    ] = "auto"
    cuda_graphs: Annotated[
        bool,
        MODEL,
        Field(description="Capture steps as CUDA graphs, which launch faster and take some memory (CUDA)."),
    ] = True
    num_threads: Annotated[
        int | None, MODEL, Field(description="CPU threads of the model. Left out: as many as torch chooses.")
    ] = None
    tensor_parallel_size: Annotated[
        int,
        MODEL,
        Field(ge=1, description="Devices of this machine that the model is divided among; on CPUs, processes."),
    ] = 1
    block_length: Annotated[
        int | None,
        DECODING,
        Field(
            description="Jacobi block length in tokens; 1 decodes token by token. Left out: the checkpoint's, or 16."
        ),
    ] = None
    drafters: Annotated[
        str,
        DECODING,
        Field(
            description="Where drafts come from, separated by commas; the one that was right further lately is used. "
            "own: Jacobi's predictions; copy: what followed the same words before; suffix: what followed them in past "
            "outputs of the server; pool: predictions not confirmed where they stood (docs/explanation/decoding.md)."
        ),
    ] = "own,copy"
    suffix_memory_mib: Annotated[
        int, MEMORY, Field(description="Memory in MiB for past outputs, where drafters name suffix.")
    ] = 16
    adaptive_block_length: Annotated[
        bool,
        DECODING,
        Field(description="Shorten blocks when the load is high or drafts are seldom confirmed; off: always whole."),
    ] = True
    gated_form: Annotated[
        GatedForm,
        DECODING,
        Field(
            description="What the rows of a gated adapter read: noise, tail (the last window's predictions), jacobi "
            "(the draft), all in the pass that verifies; two_pass: noise in a pass of its own."
        ),
    ] = "noise"
    gated_rows: Annotated[
        int | None,
        DECODING,
        Field(
            description="Most tokens that a gated adapter proposes at a time. Left out: as many as it was trained for."
        ),
    ] = None
    max_num_seqs: Annotated[int, DECODING, Field(description="Requests decoded together.")] = 32
    max_batched_tokens: Annotated[
        int, DECODING, Field(description="Token budget of one step, shared by prompt chunks and Jacobi blocks.")
    ] = 1024
    prefill_step_seconds: Annotated[
        float,
        DECODING,
        Field(
            description="Longest step, in seconds, that reading a prompt may make while other requests stream; 0 sets "
            "no limit."
        ),
    ] = 0.05
    step_timeout: Annotated[
        float | None,
        DECODING,
        Field(
            description="Seconds after which a step counts as hung: its requests end with an error and the worker is "
            "replaced. Left out: 20 times what the step should take by measured times, at least 1.5; 0 sets no limit."
        ),
    ] = None
    stream_interval: Annotated[
        float,
        DECODING,
        Field(
            description="Seconds that tokens, but a request's first, may wait to be sent with those of the next steps; "
            "0 sends them after every step."
        ),
    ] = 0.02
    prefix_caching: Annotated[
        bool, DECODING, Field(description="Compute equal prompt beginnings once and share them.")
    ] = True
    cache_memory_gib: Annotated[
        float | None, MEMORY, Field(description="Memory of the KV cache in GiB. Left out: a share of the free memory.")
    ] = None
    num_cache_blocks: Annotated[
        int | None, MEMORY, Field(description="Blocks of the KV cache. Left out: as many as the cache's memory holds.")
    ] = None
    cache_block_size: Annotated[int, MEMORY, Field(description="Tokens in one block of the KV cache.")] = 16
    gpu_memory_utilization: Annotated[
        float, MEMORY, Field(description="Share of the GPU's memory to use for weights, activations and cache.")
    ] = 0.9
    max_model_len: Annotated[
        int | None,
        LIMITS,
        Field(description="Longest prompt and output together, in tokens. Left out: the model's limit."),
    ] = None
    max_adapters: Annotated[
        int, LIMITS, Field(description="Adapters held beside the base at once, loaded ones included.")
    ] = 8
    max_adapter_rank: Annotated[
        int, LIMITS, Field(description="Highest LoRA rank of an adapter served beside the base.")
    ] = 64
    queue_timeout: Annotated[
        float | None,
        LIMITS,
        Field(description="Seconds that a request may wait for its turn before it ends with 503. Left out: no limit."),
    ] = None
    max_waiting: Annotated[
        int, LIMITS, Field(description="Requests that may wait for their turn; more are refused with 429.")
    ] = 256

    @model_validator(mode="after")
    def _check_engine_config(self) -> Self:
        self.to_engine_config()
        return self

    def to_engine_config(self) -> EngineConfig:
        """The part of the settings that the worker process gets; ConfigError where values do not fit together."""
        own = self.model_dump(include=set(EngineConfig.__struct_fields__) - {"adapters", "drafters"})
        merged, named = _sort_adapters(self.adapters)
        drafters = tuple(part.strip() for part in self.drafters.split(",") if part.strip())
        return EngineConfig(**own, adapter=merged, adapters=named, drafters=drafters)

    def to_single_model_config(self) -> EngineConfig:
        """For a command that runs one model; ConfigError where adapters are named to be served beside it."""
        config = self.to_engine_config()
        if config.adapters:
            name, path = next(iter(config.adapters.items()))
            raise ConfigError(f"adapters={name}={path}: this command runs one model; leave out {name}= to merge it")
        return config


def _sort_adapters(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The adapter to merge, None for none, and those to serve by name."""
    merged = [entry for entry in given if "=" not in entry]
    if len(merged) > 1:
        raise ConfigError(f"adapters={', '.join(merged)}: only one can be merged; serve them as NAME=ADAPTER")
    named: dict[str, str] = {}
    for name, _, path in (entry.partition("=") for entry in given if "=" in entry):
        if name in named:
            raise ConfigError(f"adapters: the name {name!r} is given twice ({named[name]}, {path})")
        if not path:
            raise ConfigError(f"adapters={name}=: names no adapter; give NAME=ADAPTER")
        named[name] = path
    return (merged[0] if merged else None), named
