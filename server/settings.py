"""The settings of the HTTP server, beside those of the engine: flags and the CLLM_* environment are made from them."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cllm_core.errors import ConfigError
from cllm_core.logs import LogFormat, LogLevel
from cllm_core.text.reasoning.formats import ReasoningFormatChoice
from cllm_core.text.tools.skeleton import ToolFormatChoice

from .engine_settings import LIMITS, MODEL, SERVER, CommaSeparated, EngineSettings, split_commas
from .http.body_limits import BodyLimits
from .http.ignored import UnknownFields

SchedulingPolicy = Literal["fair", "priority"]

_WEIGHT = re.compile(r"\d{1,6}(\.\d{1,6})?")

ANY_MODEL = "*"
"""Alias of every name that no model has."""

LOCALHOST, NO_ORIGIN = "localhost", "none"
_LOCALHOST_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


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
    reasoning_format: Annotated[
        ReasoningFormatChoice,
        SERVER,
        Field(
            description="How the model marks what it thinks before it answers. auto: as its chat template shows; none: "
            "it is part of the answer."
        ),
    ] = "auto"
    response_store: Annotated[
        str,
        SERVER,
        Field(
            min_length=1,
            description="Where /v1/responses keeps answers that clients may continue or ask for again. memory: until "
            "the server ends; off: nowhere; else the path of a SQLite file, which several servers may share.",
        ),
    ] = "memory"
    host: Annotated[str, SERVER, Field(description="Address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1"
    port: Annotated[int, SERVER, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    api_keys: Annotated[
        CommaSeparated,
        SERVER,
        Field(repr=False, description="Key that clients must send; give it again for more. Left out: no keys needed."),
    ] = ()
    admin_keys: Annotated[
        CommaSeparated,
        SERVER,
        Field(
            repr=False,
            description="Key that loading and unloading adapters needs; it is good for everything else, too. Give it "
            "again for more. Left out: the keys of clients do.",
        ),
    ] = ()
    cors_origins: Annotated[
        CommaSeparated,
        SERVER,
        Field(
            description="Web origin whose pages may call the server, as https://example.org; localhost: pages served "
            "from this machine, on any port; *: any; none: no page. Give it again for more."
        ),
    ] = (LOCALHOST,)
    playground: Annotated[
        bool, SERVER, Field(description="Serve a page at / to try the models in a browser; it needs no key itself.")
    ] = True
    log_level: Annotated[LogLevel, SERVER, Field(description="Least severity of what is logged.")] = "info"
    log_format: Annotated[LogFormat, SERVER, Field(description="auto: console on a terminal, else JSON lines.")] = (
        "auto"
    )
    otlp_endpoint: Annotated[
        str | None,
        SERVER,
        Field(
            description="URL of an OpenTelemetry collector that takes OTLP over HTTP, as http://127.0.0.1:4318: each "
            "request is sent as a trace. Needs the extra otel. Left out: none."
        ),
    ] = None
    stay_up: Annotated[
        bool,
        SERVER,
        Field(
            description="Keep answering, with 503, once the worker has failed for good, as where the model does not "
            "exist; off: the server exits with code 1."
        ),
    ] = False
    standby_worker: Annotated[
        bool,
        SERVER,
        Field(
            description="Keep a second worker process that has its imports done, so that the server is back sooner "
            "after a crash; it takes some 350 MB."
        ),
    ] = True
    shutdown_delay: Annotated[
        float,
        SERVER,
        Field(
            ge=0,
            description="Seconds after SIGTERM or Ctrl-C in which /ready is 503 but requests are still taken, so that "
            "load balancers notice first.",
        ),
    ] = 0.0
    drain_seconds: Annotated[
        float, SERVER, Field(ge=0, description="Seconds that running requests get to finish after SIGTERM.")
    ] = 30.0
    sse_ping_seconds: Annotated[
        float, SERVER, Field(gt=0, description="Seconds between the comments that keep an idle stream open.")
    ] = 15.0
    max_header_bytes: Annotated[
        int,
        LIMITS,
        Field(ge=1024, description="Longest headers of a request in bytes; longer ones are refused with 431."),
    ] = 32 * 1024
    header_timeout: Annotated[
        float,
        LIMITS,
        Field(
            gt=0, description="Seconds from the first byte of a request to the end of its headers; then it gets 408."
        ),
    ] = 10.0
    body_timeout: Annotated[
        float, LIMITS, Field(gt=0, description="Seconds from there to the end of its body; then it gets 408.")
    ] = 60.0
    send_timeout: Annotated[
        float,
        LIMITS,
        Field(
            gt=0,
            description="Seconds after which a client that reads nothing of its answer is cut off; its request ends.",
        ),
    ] = 60.0
    max_connections: Annotated[
        int | None,
        LIMITS,
        Field(
            ge=1,
            description="Most connections at a time; further ones get 503. Left out: what the limit of open files "
            "allows.",
        ),
    ] = None
    max_client_connections: Annotated[
        int | None,
        LIMITS,
        Field(
            ge=1,
            description="Most connections of one address; not for a server behind a proxy, which is one address. Left "
            "out: no limit.",
        ),
    ] = None
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
    scheduling_policy: Annotated[
        SchedulingPolicy,
        SERVER,
        Field(
            description="Order of the queue. fair: users take turns; each one's requests in the order of arrival. "
            "priority: lower values of the request field priority first, then fair. Users are told apart by their keys "
            "where there are several, else by the request fields safety_identifier and user."
        ),
    ] = "fair"
    key_weights: Annotated[
        CommaSeparated,
        SERVER,
        Field(
            repr=False,
            description="KEY=WEIGHT: requests of this API key get so many turns in the queue for one of a key without "
            "a weight. Give it again for more.",
        ),
    ] = ()
    max_user_share: Annotated[
        float,
        LIMITS,
        Field(
            gt=0,
            le=1,
            description="Part of all running and waiting requests that one user may have; more are refused with 429. "
            "Requests of nobody in particular are not limited.",
        ),
    ] = 0.75
    ttft_timeout: Annotated[
        float | None,
        LIMITS,
        Field(
            gt=0,
            description="Seconds within which the first token of a request must come, or it ends with 504. Left out: "
            "no limit.",
        ),
    ] = None
    request_timeout: Annotated[
        float | None,
        LIMITS,
        Field(gt=0, description="Seconds that a request may take in all before it ends with 504. Left out: no limit."),
    ] = None
    max_output_tokens: Annotated[
        int | None,
        LIMITS,
        Field(ge=1, description="Most output tokens of one choice, whatever the request asks for. Left out: no limit."),
    ] = None
    max_choices: Annotated[
        int, LIMITS, Field(ge=1, description="Most outputs (prompts times n or best_of) of one API request.")
    ] = 128
    max_logprob_entries: Annotated[
        int,
        LIMITS,
        Field(
            ge=1024,
            description="Most log-probabilities of one request: outputs times tokens times alternatives, each token's "
            "own and those of the prompt included. Outputs without a limit of their own are cut to it. "
            "Shaping so many holds up other streams for some 50 ms.",
        ),
    ] = 16384
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

    response_store_size: Annotated[
        int, LIMITS, Field(ge=1, description="Most responses stored; those unused for longest are dropped first.")
    ] = 1000
    response_store_days: Annotated[
        float, LIMITS, Field(gt=0, description="Days after which a stored response that nobody used is dropped.")
    ] = 30.0
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
    def weights(self) -> dict[str, float]:
        """Turns in the queue by API key."""
        return {key: float(weight) for key, _, weight in (entry.rpartition("=") for entry in self.key_weights)}

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

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _check_keys(cls, keys: object, info: ValidationInfo) -> object:
        # The default, no keys, is an empty tuple; what is given and comes to nothing is a mistake.
        if keys != () and not split_commas(keys):
            raise ConfigError(f"{info.field_name}: is given, but names no key; give one, or leave it out")
        return keys

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for number, entry in enumerate(self.key_weights, start=1):
            key, _, weight = entry.rpartition("=")
            if key not in self.api_keys:  # said without the key, which belongs in no log
                raise ConfigError(f"key_weights: entry {number}: must be KEY=WEIGHT with one of api_keys")
            if not _WEIGHT.fullmatch(weight) or not float(weight):
                raise ConfigError(f"key_weights: entry {number}: the weight must be a number above 0, as 2 or 0.5")
        return self

    @field_validator("response_store")
    @classmethod
    def _check_response_store(cls, value: str) -> str:
        if Path(value).expanduser().is_dir():
            raise ConfigError(f"response_store={value}: is a folder; give the path of a file in it, memory or off")
        return value.lower() if value.lower() in ("memory", "off") else value

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        taken = sorted(set(self.served_model_names) & self.to_engine_config().adapters.keys())
        if taken:
            raise ConfigError(f"served_model_names={taken[0]!r}: is the name of an adapter too; rename one of them")
        shadowed = sorted(self.aliases.keys() & {*self.served_model_names, *self.to_engine_config().adapters})
        if shadowed:
            raise ConfigError(f"model_aliases={shadowed[0]}: is the name of a served model; choose another alias")
        return self
