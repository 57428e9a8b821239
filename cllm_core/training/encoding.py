"""From conversations to token ids, exactly as the server encodes them: same template, same tokenizer."""

from cllm_core.errors import DataError, InvalidRequest
from cllm_core.info import TokenizerBundle
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.provenance import ChatPrompt
from cllm_core.training.prompts import Conversation


class ConversationEncoder:
    """Encodes prompts and answers.

    Args:
        bundle: the model's tokenizer; without a chat template, prompts are encoded as plain text.
        eos_token_ids: tokens that end an output; the one that ends an assistant's turn ends each answer.

    Raises:
        DataError: there is no token that could end an answer.
    """

    def __init__(self, bundle: TokenizerBundle, eos_token_ids: tuple[int, ...]) -> None:
        if not eos_token_ids:
            raise DataError("the model names no end-of-sequence token: answers could not be ended; correct its config")
        self.codec = TextCodec(bundle)
        self._template = ChatTemplate.of(bundle)
        self._end_id = self._find_end(eos_token_ids)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def prompt_text(self, conversation: Conversation) -> str:
        """The text that the model continues with the answer; errors as encode_prompt."""
        if self._template is None:
            return _only_text(conversation)
        return _render(self._template, conversation).text

    def encode_prompt(self, conversation: Conversation) -> tuple[int, ...]:
        """Token ids of the prompt, what opens the assistant's turn included.

        Raises:
            DataError: the chat template refuses the messages, or there is none and more than one message.
        """
        if self._template is None:
            return tuple(self.codec.encode(_only_text(conversation), add_special_tokens=True))
        return tuple(self.codec.encode_chat(_render(self._template, conversation)))

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of the answer and the token that ends it."""
        return (*self.codec.encode(answer, add_special_tokens=False), self._end_id)

    def _find_end(self, eos_token_ids: tuple[int, ...]) -> int:
        """The end token that the template writes after an assistant's message, else the first one."""
        if self._template is not None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            text = self._template.render(turns, add_generation_prompt=False).text
            tail = self.codec.encode(text.rpartition("b")[2], add_special_tokens=False)
            found = [token_id for token_id in tail if token_id in eos_token_ids]
            if found:
                return found[0]
        return eos_token_ids[0]


def _only_text(conversation: Conversation) -> str:
    if len(conversation.messages) > 1:
        raise DataError("the model has no chat template: give one prompt instead of several messages")
    return conversation.messages[0].content


def _render(template: ChatTemplate, conversation: Conversation) -> ChatPrompt:
    try:
        return template.render([{"role": m.role, "content": m.content} for m in conversation.messages])
    except InvalidRequest as error:
        raise DataError(f"{error}: {conversation.messages[-1].content[:80]!r}") from error
