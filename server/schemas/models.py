"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One served model; the last two fields are extensions.

    Attributes:
        created: Unix time in seconds.
        max_model_len: longest prompt and output together, in tokens.
        block_length: Jacobi block length used where a request gives none.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cllm"
    max_model_len: int
    block_length: int


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
