"""Bodies of /tokenize, /detokenize and /v1/chat/completions/render."""

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from cllm_core.errors import InvalidRequest

from ..chat.messages import Messages
from ..chat.request import TemplateKwargs
from ..shared.api_model import EXAMPLE_MODEL, ApiModel, Integer


class TokenizeRequest(ApiModel):
    """Body of /tokenize: a text, or messages that the chat template makes a text of.

    Attributes:
        add_special_tokens: add what the tokenizer puts around a text (bos), as /v1/completions does; default true.
        add_generation_prompt: end with what opens the assistant's turn, as chat completions do; default true.
        return_token_strs: answer with the text of each token too.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "prompt": "Jacobi was"}]})

    keeps_empty: ClassVar[frozenset[str]] = frozenset({"prompt", "messages"})

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt: either prompt or messages is needed, and not both", param="prompt")
        if self.messages is None:
            self._refuse("add_generation_prompt", self.add_generation_prompt, "messages")
            self._refuse("chat_template_kwargs", self.chat_template_kwargs, "messages")
        else:
            self._refuse("add_special_tokens", self.add_special_tokens, "prompt")
        return self

    def _refuse(self, name: str, value: object, only_with: str) -> None:
        if value is not None:
            raise InvalidRequest(f"{name}: has no meaning without {only_with}; leave it out", param=name)


class TokenizeResponse(BaseModel):
    """Tokens of a text.

    Attributes:
        max_model_len: longest prompt and output together, in tokens.
        token_strs: the text of each token, special ones spelled out.
    """

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(ApiModel):
    """Body of /detokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "tokens": [5, 6]}]})

    model: str | None = None
    tokens: list[Integer]


class DetokenizeResponse(BaseModel):
    """Text of the tokens, special ones spelled out."""

    prompt: str


class RenderResponse(BaseModel):
    """The prompt of a chat completion request, special tokens spelled out, and its tokens."""

    prompt: str
    count: int
    max_model_len: int
    token_ids: list[int]
