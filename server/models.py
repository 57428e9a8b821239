"""The loaded model as the API shows it: its name, its text tools and its fingerprint."""

import asyncio
import hashlib
import time
from dataclasses import dataclass

from cllm_core import __version__
from cllm_core.info import ModelInfo
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.worker.protocol import EngineClient
from server.errors import ModelNotFound
from server.settings import ServerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What a route needs of the model.

    Attributes:
        name: served name.
        chat_template: None where the checkpoint has none.
        fingerprint: changes when the same seed may give another text (`system_fingerprint`).
        created: Unix time in seconds at which it was first seen here.
    """

    name: str
    info: ModelInfo
    codec: TextCodec
    chat_template: ChatTemplate | None
    fingerprint: str
    created: int


class ModelRegistry:
    """Knows the models by their served names; today there is one, whatever the worker loaded."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        self._engine = engine
        self._served_name = settings.served_model_name
        self._loaded: LoadedModel | None = None
        self._building = asyncio.Lock()

    @property
    def name_or_empty(self) -> str:
        """Served name for labels; empty while nothing is loaded."""
        return self._loaded.name if self._loaded is not None else ""

    async def current(self) -> LoadedModel:
        """The loaded model, its tokenizer built at most once per load; EngineUnavailable before the first load."""
        info = self._engine.info
        async with self._building:
            if self._loaded is None or self._loaded.info is not info:
                # Seconds for a large vocabulary: not on the event loop.
                self._loaded = await asyncio.to_thread(_build, info, self._served_name or info.name)
        return self._loaded

    async def get(self, name: str) -> LoadedModel:
        """The model of that served name.

        Raises:
            ModelNotFound: no model has it.
            EngineUnavailable: nothing is loaded yet.
        """
        model = await self.current()
        if model.name != name:
            raise ModelNotFound(
                f"The model {name!r} does not exist here; this server has {model.name!r}", param="model"
            )
        return model


def _build(info: ModelInfo, name: str) -> LoadedModel:
    bundle = info.tokenizer
    template = None
    if bundle.chat_template is not None:
        template = ChatTemplate(bundle.chat_template, bundle.special_tokens)
    return LoadedModel(
        name=name,
        info=info,
        codec=TextCodec(bundle),
        chat_template=template,
        fingerprint=_fingerprint(info),
        created=int(time.time()),
    )


def _fingerprint(info: ModelInfo) -> str:
    facts = (__version__, info.name, info.architecture, info.num_parameters, info.device, info.dtype)
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
