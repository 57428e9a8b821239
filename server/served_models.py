"""The served models as the API shows them: the base and the adapters beside it, each with its text tools."""

import asyncio
import hashlib
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from cllm_core import __version__
from cllm_core.info import AdapterInfo, ModelInfo, TokenizerBundle
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.dialect import Dialect, find_dialect
from cllm_core.worker.engine_client import EngineClient

from .http.errors import ModelNotFound
from .settings import ANY_MODEL, ServerSettings


@dataclass(frozen=True, slots=True)
class TextTools:
    """What turns texts into tokens and back, made of a bundle.

    Attributes:
        chat_template: None where the bundle has none.
        dialect: how the model is told of functions, calls them, and reasons before it answers.
    """

    bundle: TokenizerBundle
    codec: TextCodec
    chat_template: ChatTemplate | None
    dialect: Dialect


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What a route needs of a model.

    Attributes:
        name: served name.
        info: of the base.
        adapter: that is served under this name, None for the base itself.
        parent: served name of the adapter's base, None for the base itself.
        fingerprint: changes when the same seed may give another text (`system_fingerprint`).
        created: Unix time in seconds at which it was first seen here.
    """

    name: str
    info: ModelInfo
    tools: TextTools
    adapter: AdapterInfo | None = None
    parent: str | None = None
    fingerprint: str
    created: int

    @property
    def codec(self) -> TextCodec:
        """Of the model's tokenizer."""
        return self.tools.codec

    @property
    def chat_template(self) -> ChatTemplate | None:
        """None where there is none."""
        return self.tools.chat_template

    @property
    def dialect(self) -> Dialect:
        """How the model is told of functions and calls them."""
        return self.tools.dialect

    @property
    def adapter_name(self) -> str:
        """As requests to the engine give it; "" for the base."""
        return "" if self.adapter is None else self.adapter.name

    @property
    def root(self) -> str:
        """What was named to load it."""
        return self.info.name if self.adapter is None else self.adapter.path

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens any of which ends an output."""
        return self.info.eos_token_ids if self.adapter is None else self.adapter.eos_token_ids

    @property
    def block_length(self) -> int:
        """Jacobi block length used where a request gives none."""
        return self.info.block_length if self.adapter is None else self.adapter.block_length

    @property
    def domain(self) -> str | None:
        """What the model was trained for, None for a plain one."""
        return self.info.domain if self.adapter is None else self.adapter.domain

    @property
    def gated_adapter(self) -> str | None:
        """What was named to load the adapter that proposes for it, None where there is none."""
        gated = self.info.gated if self.adapter is None else None
        return None if gated is None else gated.path


class ModelRegistry:
    """Knows the models by their served names: those of the base first, then the adapters."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._info: ModelInfo | None = None
        self._models: dict[str, LoadedModel] = {}
        self._building = asyncio.Lock()

    @property
    def name_or_empty(self) -> str:
        """First served name of the base, for labels; empty while nothing is loaded."""
        return next(iter(self._models), "")

    @property
    def first_or_none(self) -> LoadedModel | None:
        """The base by its first served name, None while nothing is loaded."""
        return next(iter(self._models.values()), None)

    async def all(self) -> list[LoadedModel]:
        """Every served model, its tokenizer built at most once per load; EngineUnavailable before the first load."""
        info = self._engine.info
        async with self._building:
            if self._info is not info:
                # Seconds for a large vocabulary: not on the event loop.
                self._models = await asyncio.to_thread(_build, info, self._settings, self._models)
                self._info = info
        return list(self._models.values())

    async def current(self) -> LoadedModel:
        """The base under its first name; raises as `all`."""
        return (await self.all())[0]

    async def get(self, name: str | None) -> LoadedModel:
        """The model that answers requests for that name, which may be an alias; the base for None.

        Raises:
            ModelNotFound: no model has the name.
            EngineUnavailable: nothing is loaded yet.
        """
        models = {model.name: model for model in await self.all()}
        if name is None:
            return next(iter(models.values()))
        if name in models:
            return models[name]
        aliases = self._settings.aliases
        meant = aliases.get(name, aliases.get(ANY_MODEL))
        if meant in models:
            return replace(models[meant], name=name)
        raise _not_found(name, models, meant)

    async def find(self, name: str, *, param: str) -> LoadedModel:
        """The model that has the name itself (ModelNotFound names the request field `param`)."""
        models = {model.name: model for model in await self.all()}
        if name not in models:
            raise _not_found(name, models, None, param=param)
        return models[name]

    async def listed(self) -> list[LoadedModel]:
        """What is there to choose from: every served model, then the aliases of those."""
        models = {model.name: model for model in await self.all()}
        aliases = {alias: meant for alias, meant in self._settings.aliases.items() if alias != ANY_MODEL}
        named = [replace(models[meant], name=alias) for alias, meant in aliases.items() if meant in models]
        return [*models.values(), *named]


def _not_found(name: str, served: Iterable[str], meant: str | None, *, param: str = "model") -> ModelNotFound:
    alias = "" if meant is None else f" (an alias of {meant!r})"
    names = ", ".join(map(repr, served))
    return ModelNotFound(f"The model {name!r}{alias} does not exist here; this server has {names}", param=param)


def _build(info: ModelInfo, settings: ServerSettings, known: Mapping[str, LoadedModel]) -> dict[str, LoadedModel]:
    """The models by name; text tools and times of those that are known already are kept."""
    made = [model.tools for model in known.values()]
    names = settings.served_model_names or (info.name,)
    base_tools = _tools(info.tokenizer, made, info.eos_token_ids, settings)
    now = int(time.time())
    models: dict[str, LoadedModel] = {}
    for name in names:
        models[name] = LoadedModel(
            name=name, info=info, tools=base_tools, fingerprint=_fingerprint(info, None), created=now
        )
    for adapter in info.adapters:
        if adapter.name in models:  # of a worker that was started elsewhere: our own settings refuse it
            continue
        models[adapter.name] = LoadedModel(
            name=adapter.name,
            info=info,
            tools=base_tools
            if adapter.tokenizer is None
            else _tools(adapter.tokenizer, made, adapter.eos_token_ids, settings),
            adapter=adapter,
            parent=names[0],
            fingerprint=_fingerprint(info, adapter),
            created=now,
        )
    return {name: _since(model, known.get(name)) for name, model in models.items()}


def _since(model: LoadedModel, before: LoadedModel | None) -> LoadedModel:
    """The model with the time at which it was first seen."""
    if before is None or before.fingerprint != model.fingerprint:
        return model
    return replace(model, created=before.created)


def _tools(
    bundle: TokenizerBundle, made: Iterable[TextTools], end_ids: Collection[int], settings: ServerSettings
) -> TextTools:
    for tools in made:
        if tools.bundle == bundle:
            return tools
    template = ChatTemplate.of(bundle)
    codec = TextCodec(bundle)
    dialect = find_dialect(
        template,
        codec,
        tool_format=settings.tool_call_format,
        reasoning_format=settings.reasoning_format,
        end_ids=end_ids,
    )
    return TextTools(bundle, codec, template, dialect)


def _fingerprint(info: ModelInfo, adapter: AdapterInfo | None) -> str:
    facts: tuple[object, ...] = (
        __version__,
        info.name,
        info.architecture,
        info.num_parameters,
        info.device,
        info.number_format,
    )
    if adapter is not None:
        facts = (*facts, adapter.revision)
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
