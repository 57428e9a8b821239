"""From a transformers tokenizer to a TokenizerBundle: all that the API process needs, without transformers."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cllm_core.errors import ModelLoadError
from cllm_core.info import TokenizerBundle
from cllm_core.models.chat_templates import find_templates


def build_bundle(
    tokenizer: PreTrainedTokenizerBase, *, model_name: str, chat_template: str | None = None
) -> TokenizerBundle:
    """What the `tokenizers` library needs to give the same ids as `tokenizer`, and the chat templates.

    Args:
        tokenizer: of the checkpoint, not changed.
        model_name: what was named to load it.
        chat_template: as EngineConfig.chat_template.

    Raises:
        ModelLoadError: the tokenizer has no form that the `tokenizers` library can run, or a chat template is broken.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelLoadError(
            f"{model_name}: its tokenizer ({type(tokenizer).__name__}) is Python code; convert it to tokenizer.json"
        )
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        # A file may carry them from its training run; transformers turns both off, and so do we. In a copy, and only
        # then: copying a large vocabulary takes a second.
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    templates = find_templates(tokenizer, model_name=model_name, chosen=chat_template)
    return TokenizerBundle(
        tokenizer_json=backend.to_str(),
        chat_template=templates.default,
        tool_use_template=templates.tool_use,
        special_tokens={name: str(text) for name, text in tokenizer.special_tokens_map.items()},
    )
