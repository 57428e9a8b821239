"""Which chat template a model gets: the one that the user chose, its own, or the one of its training.

`templates/` holds the common formats by name, and those of the four published CLLM checkpoints, which bring no chat
template. The latter are the formats of the authors' repository (hao-ai-lab/Consistency_LLM, arXiv:2403.00835):

    sharegpt48k     data/generate_trajectory.py, preprocess_sharegpt: FastChat's vicuna_v1.1 conversation
    math            data/generate_trajectory.py and eval/gsm8k/speedup.py: "Question: ... Answer: ..."
    spider          data/generate_trajectory.py and eval/spider/speedup.py: instruction, with the task stated before it
    codesearchnet   data/generate_trajectory.py: instruction, with the task stated before it
"""

import importlib.resources
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec
from transformers import PreTrainedTokenizerBase

from cllm_core.errors import ConfigError, ModelLoadError
from cllm_core.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

_BUILTIN = {
    "cllm/consistency-llm-7b-sharegpt48k": "vicuna",
    "cllm/consistency-llm-7b-math": "math",
    "cllm/consistency-llm-7b-spider": "spider",
    "cllm/consistency-llm-7b-codesearchnet": "codesearchnet",
}
_PROCESSOR_FILE = "chat_template.json"  # of models that read images, beside a tokenizer that has none


class ChatTemplates(msgspec.Struct, frozen=True, kw_only=True):
    """The Jinja texts of a model's templates.

    Attributes:
        default: None where the model has none.
        tool_use: for conversations with tools, None where `default` is for all of them.
    """

    default: str | None = None
    tool_use: str | None = None


def find_templates(tokenizer: PreTrainedTokenizerBase, *, model_name: str, chosen: str | None = None) -> ChatTemplates:
    """The chat templates of a model.

    Args:
        tokenizer: of the checkpoint.
        model_name: what was named to load it; the published CLLM checkpoints have built-in templates.
        chosen: name of a template or path of a Jinja file, which takes the place of the model's own; None for those.

    Raises:
        ModelLoadError: what was chosen does not exist, or a template is no valid one.
    """
    if chosen is not None:
        templates = ChatTemplates(default=_chosen(chosen))
    else:
        templates = _own(tokenizer, model_name) or ChatTemplates(default=builtin_template(model_name))
    check_templates(templates, f"chat_template={chosen}" if chosen is not None else model_name)
    return templates


def check_templates(templates: ChatTemplates, place: str) -> None:
    """Raise ModelLoadError where a template does not compile: here, and not at every request."""
    for source in (templates.default, templates.tool_use):
        if source is not None:
            try:
                ChatTemplate(source)
            except ConfigError as error:
                raise ModelLoadError(f"{place}: {error}") from error


def template_names() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(path.name.removesuffix(".jinja") for path in _FOLDER.iterdir() if path.name.endswith(".jinja"))


def builtin_template(model_name: str) -> str | None:
    """Chat template of a published CLLM checkpoint by its Hub id; None for every other model."""
    name = _BUILTIN.get(model_name)
    return None if name is None else _named(name)


_FOLDER = importlib.resources.files("cllm_core.models") / "templates"


def _named(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _chosen(name: str) -> str:
    if name in template_names():
        return _named(name)
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ModelLoadError(
            f"chat_template={name}: no template has this name, and it cannot be read as a file ({reason}); give the "
            f"path of a Jinja file or one of {', '.join(template_names())}"
        ) from error


def _own(tokenizer: PreTrainedTokenizerBase, model_name: str) -> ChatTemplates | None:
    """The templates that the checkpoint brings, None where it brings none that can be used."""
    brought: object = tokenizer.chat_template
    if brought is None:
        brought = _of_processor(Path(tokenizer.name_or_path) / _PROCESSOR_FILE)
    if brought is None:
        return None
    if isinstance(brought, str):
        return ChatTemplates(default=brought)
    if not isinstance(brought, Mapping) or not all(isinstance(source, str) for source in brought.values()):
        raise ModelLoadError(
            f"{model_name}: its chat template must be a text, or texts by name, not {brought!r:.80}; correct "
            "tokenizer_config.json, or choose another with --chat-template"
        )
    named = dict(brought)
    if "default" in named:
        return ChatTemplates(default=named["default"], tool_use=named.get("tool_use"))
    if len(named) == 1:
        return ChatTemplates(default=next(iter(named.values())))
    logger.warning("none of the chat templates %s is called default; none is used", sorted(named))
    return None


def _of_processor(path: Path) -> object:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object]).get("chat_template")
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({error}); correct it, or delete it") from error
