"""Every setting of the server, defined once: the command line's flags and the CLLM_* environment are made from it.

The engine's settings are those of `cllm_core.config.EngineConfig`, by the same names and with the same defaults.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from cllm_core.config import CpuIsaName, DeviceName, DTypeName, EngineConfig, GenerationConfigChoice, QuantizationName
from cllm_core.errors import ConfigError
from cllm_core.logs import LogFormat, LogLevel
from cllm_core.text.tools.skeleton import ToolFormatChoice
from server.http.body_limits import BodyLimits
from server.http.ignored import UnknownFields

PanelName = Literal["Model", "Decoding", "Memory", "Server", "Limits"]

ENV_PREFIX = "CLLM_"

ANY_MODEL = "*"
"""Alias of every name that no model has."""

LOCALHOST, NO_ORIGIN = "localhost", "none"
_LOCALHOST_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


@dataclass(frozen=True, slots=True)
class Panel:
    """Names the heading under which `--help` shows a setting."""

    name: PanelName


MODEL = Panel("Model")
DECODING = Panel("Decoding")
MEMORY = Panel("Memory")
SERVER = Panel("Server")
LIMITS = Panel("Limits")

CommaSeparated = Annotated[tuple[str, ...], NoDecode]
_COMMA_SEPARATED = ("adapters", "served_model_names", "api_keys", "cors_origins", "model_aliases")


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
            "leaves out are those of the checkpoint's generation_config.json. none: the file sets no defaults."
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
            "at load (docs/models.md)."
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
    block_length: Annotated[
        int | None,
        DECODING,
        Field(
            description="Jacobi block length in tokens; 1 decodes token by token. Left out: the checkpoint's, or 16."
        ),
    ] = None
    adaptive_block_length: Annotated[
        bool,
        DECODING,
        Field(description="Shorten blocks when the load is high or drafts are seldom confirmed; off: always whole."),
    ] = True
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
    max_waiting: Annotated[
        int, LIMITS, Field(description="Requests that may wait for their turn; more are refused with 429.")
    ] = 256

    @model_validator(mode="after")
    def _check_engine_config(self) -> Self:
        self.to_engine_config()
        return self

    @field_validator(*_COMMA_SEPARATED, mode="before", check_fields=False)
    @classmethod
    def _split_commas(cls, value: object) -> object:
        given = [value] if isinstance(value, str) else value
        if isinstance(given, list):
            return tuple(part.strip() for text in given for part in text.split(",") if part.strip())
        return given

    def to_engine_config(self) -> EngineConfig:
        """The part of the settings that the worker process gets; ConfigError where values do not fit together."""
        own = self.model_dump(include=set(EngineConfig.__struct_fields__) - {"adapters"})
        merged, named = _sort_adapters(self.adapters)
        return EngineConfig(**own, adapter=merged, adapters=named)

    def to_single_model_config(self) -> EngineConfig:
        """For a command that runs one model; ConfigError where adapters are named to be served beside it."""
        config = self.to_engine_config()
        if config.adapters:
            name, path = next(iter(config.adapters.items()))
            raise ConfigError(f"adapters={name}={path}: this command runs one model; leave out {name}= to merge it")
        return config


class ServerSettings(EngineSettings):
    """The engine's settings and those of the HTTP server."""

    worker: Annotated[
        str | None,
        MODEL,
        Field(description="Endpoint of a worker started by `cllm worker`. Left out: the server starts its own."),
    ] = None
    served_model_names: Annotated[
        CommaSeparated,
        SERVER,
        Field(
            description="Name of the base model in the API; give it again for more. Left out: the name of what is "
            "loaded."
        ),
    ] = ()
    model_aliases: Annotated[
        CommaSeparated,
        SERVER,
        Field(
            description="ALIAS=MODEL: answer requests for ALIAS with the served model MODEL, as in gpt-4o=cllm-chat; "
            "*=MODEL answers those for any unknown name. Give it again for more."
        ),
    ] = ()
    tool_call_format: Annotated[
        ToolFormatChoice,
        SERVER,
        Field(description="How the model writes calls of functions. auto: as its chat template shows, else hermes."),
    ] = "auto"
    host: Annotated[str, SERVER, Field(description="Address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1"
    port: Annotated[int, SERVER, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    api_keys: Annotated[
        CommaSeparated,
        SERVER,
        Field(repr=False, description="Key that clients must send; give it again for more. Left out: no keys needed."),
    ] = ()
    cors_origins: Annotated[
        CommaSeparated,
        SERVER,
        Field(
            description="Web origin whose pages may call the server, as https://example.org; localhost: pages served "
            "from this machine, on any port; *: any; none: no page. Give it again for more."
        ),
    ] = (LOCALHOST,)
    log_level: Annotated[LogLevel, SERVER, Field(description="Least severity of what is logged.")] = "info"
    log_format: Annotated[LogFormat, SERVER, Field(description="auto: console on a terminal, else JSON lines.")] = (
        "auto"
    )
    drain_seconds: Annotated[
        float, SERVER, Field(ge=0, description="Seconds that running requests get to finish after SIGTERM.")
    ] = 30.0
    sse_ping_seconds: Annotated[
        float, SERVER, Field(gt=0, description="Seconds between the comments that keep an idle stream open.")
    ] = 15.0
    max_body_bytes: Annotated[
        int, LIMITS, Field(ge=1024, description="Longest request body in bytes; longer ones are refused with 413.")
    ] = 8 * 1024 * 1024
    unknown_fields: Annotated[
        UnknownFields,
        SERVER,
        Field(
            description="What becomes of request fields that this server does not know or cannot honour, as long as "
            "they change no answer. warn: they are named in the header X-Ignored-Fields, counted and logged; ignore: "
            "nothing is said; refuse: 400."
        ),
    ] = "warn"
    max_output_tokens: Annotated[
        int | None,
        LIMITS,
        Field(ge=1, description="Most output tokens of one choice, whatever the request asks for. Left out: no limit."),
    ] = None
    max_choices: Annotated[
        int, LIMITS, Field(ge=1, description="Most outputs (prompts times n or best_of) of one API request.")
    ] = 128
    max_items: Annotated[
        int,
        LIMITS,
        Field(ge=64, description="Most entries of any list or object of a request: messages, logit_bias, ..."),
    ] = 4096
    max_depth: Annotated[
        int, LIMITS, Field(ge=8, description="Most lists and objects within each other in a request body.")
    ] = 32
    max_stop_chars: Annotated[int, LIMITS, Field(ge=1, description="Longest stop string in characters.")] = 1024
    max_template_kwargs_chars: Annotated[
        int, LIMITS, Field(ge=0, description="Longest chat_template_kwargs, in characters of JSON.")
    ] = 16384

    max_tools: Annotated[int, LIMITS, Field(ge=0, description="Most tools that one request may offer.")] = 128
    max_tools_chars: Annotated[
        int, LIMITS, Field(ge=0, description="Longest tools of one request together, in characters of JSON.")
    ] = 131072

    max_grammar_chars: Annotated[
        int,
        LIMITS,
        Field(ge=1, description="Longest JSON schema, regex, choice or grammar that an output has to match."),
    ] = 65536
    max_grammar_seconds: Annotated[
        float, LIMITS, Field(gt=0, description="Seconds that compiling one of these may take.")
    ] = 0.5

    @property
    def body_limits(self) -> BodyLimits:
        """The bounds on the shape of request bodies."""
        return BodyLimits(
            max_items=self.max_items,
            max_depth=self.max_depth,
            max_stop_chars=self.max_stop_chars,
            max_template_kwargs_chars=self.max_template_kwargs_chars,
            max_grammar_chars=self.max_grammar_chars,
            max_tools=self.max_tools,
            max_tools_chars=self.max_tools_chars,
        )

    @property
    def aliases(self) -> dict[str, str]:
        """Served model by alias; ANY_MODEL stands for every unknown name."""
        return dict(entry.split("=", 1) for entry in self.model_aliases)

    @property
    def allowed_origins(self) -> list[str]:
        """Web origins that are allowed by name."""
        return [origin for origin in self.cors_origins if origin not in (LOCALHOST, NO_ORIGIN)]

    @property
    def allowed_origin_regex(self) -> str | None:
        """Pattern of the web origins that are allowed beside those, None for none."""
        return _LOCALHOST_ORIGINS if LOCALHOST in self.cors_origins else None

    @field_validator("model_aliases")
    @classmethod
    def _check_aliases(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        aliases = [alias for alias, _, _ in (entry.partition("=") for entry in entries)]
        for entry in entries:
            alias, _, model = entry.partition("=")
            if not alias or not model:
                raise ConfigError(f"model_aliases={entry}: must be ALIAS=MODEL, as in gpt-4o=cllm-chat")
            if aliases.count(alias) > 1:
                raise ConfigError(f"model_aliases={entry}: the alias {alias!r} is given twice; leave one of them out")
        return entries

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        taken = sorted(set(self.served_model_names) & self.to_engine_config().adapters.keys())
        if taken:
            raise ConfigError(f"served_model_names={taken[0]!r}: is the name of an adapter too; rename one of them")
        shadowed = sorted(self.aliases.keys() & {*self.served_model_names, *self.to_engine_config().adapters})
        if shadowed:
            raise ConfigError(f"model_aliases={shadowed[0]}: is the name of a served model; choose another alias")
        return self


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
