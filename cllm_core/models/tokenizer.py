"""From a transformers tokenizer to a TokenizerBundle: all that the API process needs, without transformers.

The four published CLLM checkpoints bring no chat template; `templates/` holds one for each, in the prompt format of its
training. The formats are those of the authors' repository (hao-ai-lab/Consistency_LLM, arXiv:2403.00835):

    sharegpt48k     data/generate_trajectory.py, preprocess_sharegpt: FastChat's vicuna_v1.1 conversation
    math            data/generate_trajectory.py and eval/gsm8k/speedup.py: "Question: ... Answer: ..."
    spider          data/generate_trajectory.py and eval/spider/speedup.py: instruction, with the task stated before it
    codesearchnet   data/generate_trajectory.py: instruction, with the task stated before it
"""

import importlib.resources
import logging

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cllm_core.errors import ModelLoadError
from cllm_core.info import TokenizerBundle

logger = logging.getLogger(__name__)

_BUILTIN_TEMPLATES = {
    "cllm/consistency-llm-7b-sharegpt48k": "vicuna.jinja",
    "cllm/consistency-llm-7b-math": "math.jinja",
    "cllm/consistency-llm-7b-spider": "spider.jinja",
    "cllm/consistency-llm-7b-codesearchnet": "codesearchnet.jinja",
}


def build_bundle(tokenizer: PreTrainedTokenizerBase, *, model_name: str) -> TokenizerBundle:
    """What the `tokenizers` library needs to give the same ids as `tokenizer`, and the chat template.

    Args:
        tokenizer: of the checkpoint, not changed.
        model_name: Hub id; the published CLLM checkpoints get a built-in template where they have none of their own.

    Raises:
        ModelLoadError: the tokenizer has no form that the `tokenizers` library can run.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelLoadError(
            f"{model_name}: its tokenizer ({type(tokenizer).__name__}) is Python code; convert it to tokenizer.json"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # A file may carry the truncation and padding of its training run; transformers turns both off, and so do we.
    backend.no_truncation()
    backend.no_padding()
    return TokenizerBundle(
        tokenizer_json=backend.to_str(),
        chat_template=_own_template(tokenizer) or builtin_template(model_name),
        special_tokens={name: str(text) for name, text in tokenizer.special_tokens_map.items()},
    )


def builtin_template(model_name: str) -> str | None:
    """Chat template of a published CLLM checkpoint by its Hub id; None for every other model."""
    file = _BUILTIN_TEMPLATES.get(model_name)
    if file is None:
        return None
    return (importlib.resources.files("cllm_core.models") / "templates" / file).read_text(encoding="utf-8")


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The checkpoint's template; of several named ones the default, or the only one."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    if template is None or isinstance(template, str):
        return template
    if len(template) > 1 and "default" not in template:
        logger.warning("none of the chat templates %s is called default; none is used", sorted(template))
        return None
    return template.get("default") or next(iter(template.values()), None)
