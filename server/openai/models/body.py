"""Bodies of /v1/models and of loading and unloading adapters."""

from typing import Literal

from pydantic import BaseModel

from ..shared.api_model import ApiModel


class ModelCard(BaseModel):
    """One served model; the fields after `owned_by` are extensions.

    Attributes:
        created: Unix time in seconds.
        root: what was named to load it: Hub id, path or built-in name.
        parent: the base that an adapter stands on, null for the base itself.
        max_model_len: longest prompt and output together, in tokens.
        block_length: Jacobi block length used where a request gives none.
        domain: what the model was trained for, null for a plain one.
        gated_adapter: what proposes for it, null where nothing does.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cllm"
    root: str
    parent: str | None
    max_model_len: int
    block_length: int
    domain: str | None
    gated_adapter: str | None = None


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoadAdapterRequest(ApiModel):
    """Body of /v1/load_lora_adapter.

    Attributes:
        lora_name: to serve the adapter under.
        lora_path: folder below --adapter-root, or the name of a built-in adapter.
    """

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(ApiModel):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str


class UnloadedAdapter(BaseModel):
    """The answer to it, in the form of OpenAI's for a model that was deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
