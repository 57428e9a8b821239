"""The tool formats of the families of models, and which of them a chat template shows.

They are documented by the chat templates of the families themselves, for gpt-oss by OpenAI's description of harmony.
"""

import re
from collections.abc import Mapping

import msgspec

from cllm_core.text.tools.keywords import KeywordArguments
from cllm_core.text.tools.skeleton import ToolFormat, ToolFormatChoice, ToolFormatName
from cllm_core.text.tools.tagged import TaggedArguments

_HERMES = ToolFormat(
    name="hermes",
    first='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    next='\n<tool_call>\n{"name": "',
    marker="<tool_call>",
    # Others put tags between these marks.
    template_pattern=r'<tool_call>(?s:.*)arguments\\?":',
    tokens=("<tool_call>", "</tool_call>"),
)

_LLAMA3 = ToolFormat(
    name="llama3",
    first='{"name": "',
    between='", "parameters": ',
    after="}",
    next='; {"name": "',
    marker=None,
    # `ipython` is what this family calls the role of tools.
    template_pattern=r'ipython(?s:.*)parameters\\?":',
)

_MISTRAL = ToolFormat(
    name="mistral",
    first='[TOOL_CALLS] [{"name": "',
    between='", "arguments": ',
    after="}",
    next=', {"name": "',
    last="]",
    marker="[TOOL_CALLS]",
    template_pattern=r"\[TOOL_CALLS\]",
    tokens=("[TOOL_CALLS]",),
    has_short_ids=True,
)

_MISTRAL_NEMO = msgspec.structs.replace(
    _MISTRAL, first=_MISTRAL.first.replace("] [", "]["), template_pattern=r"\[TOOL_CALLS\]\["
)

_MISTRAL_ARGS = msgspec.structs.replace(
    _MISTRAL,
    first="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    next="[TOOL_CALLS]",
    last="",
    template_pattern=r"\[TOOL_CALLS\](?s:.*)\[ARGS\]",
    tokens=("[TOOL_CALLS]", "[ARGS]"),
)

_QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    first="<tool_call>\n<function=",
    between=">\n",
    after="</function>\n</tool_call>",
    next="\n<tool_call>\n<function=",
    marker="<tool_call>",
    template_pattern=r"<tool_call>(\\n|\n)<function=",
    style=TaggedArguments(before_name="<parameter=", before_value=">\n", after_value="\n</parameter>\n"),
    tokens=("<tool_call>", "</tool_call>"),
)

_SEED_OSS = ToolFormat(
    name="seed_oss",
    first="<seed:tool_call>\n<function=",
    between=">\n",
    after="</function>\n</seed:tool_call>",
    next="\n<seed:tool_call>\n<function=",
    marker="<seed:tool_call>",
    template_pattern=r"<seed:tool_call>",
    style=TaggedArguments(before_name="<parameter=", before_value=">", after_value="</parameter>\n"),
    tokens=("<seed:tool_call>", "</seed:tool_call>"),
)

_MINIMAX_M2 = ToolFormat(
    name="minimax_m2",
    first='<minimax:tool_call>\n<invoke name="',
    between='">\n',
    after="</invoke>",
    next='\n<invoke name="',
    last="\n</minimax:tool_call>",
    marker="<minimax:tool_call>",
    template_pattern=r"<minimax:tool_call>",
    style=TaggedArguments(before_name='<parameter name="', before_value='">', after_value="</parameter>\n"),
    tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
)

_GLM45 = ToolFormat(
    name="glm45",
    first="<tool_call>",
    between="\n",
    after="</tool_call>",
    next="\n<tool_call>",
    marker="<tool_call>",
    template_pattern=r"<arg_key>",
    style=TaggedArguments(
        before_name="<arg_key>", before_value="</arg_key>\n<arg_value>", after_value="</arg_value>\n"
    ),
    tokens=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)

_GLM47 = msgspec.structs.replace(
    _GLM45,
    between="",
    next="<tool_call>",
    template_pattern=r"</arg_key><arg_value>",
    style=TaggedArguments(before_name="<arg_key>", before_value="</arg_key><arg_value>", after_value="</arg_value>"),
)

_DEEPSEEK_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)

_DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    first="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    between="\n```json\n",
    after="\n```<｜tool▁call▁end｜>",
    next="\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    last="<｜tool▁calls▁end｜>",
    marker="<｜tool▁calls▁begin｜>",
    template_pattern=r"<｜tool▁sep｜>(?s:.*)```json",
    tokens=_DEEPSEEK_TOKENS,
)

_DEEPSEEK_V31 = msgspec.structs.replace(
    _DEEPSEEK_V3,
    first="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    between="<｜tool▁sep｜>",
    after="<｜tool▁call▁end｜>",
    next="<｜tool▁call▁begin｜>",
    template_pattern=r"<｜tool▁sep｜>",
)

_PYTHONIC = ToolFormat(
    name="pythonic",
    first="[",
    between="(",
    after=")",
    next=", ",
    last="]",
    marker=None,
    # How the templates of Llama 3.2 and 4 tell the model of the form.
    template_pattern=r"\[func_name1\(",
    style=KeywordArguments(python_words=True),
)

_OLMO3 = ToolFormat(
    name="olmo3",
    first="<function_calls>",
    between="(",
    after=")",
    next="\n",
    last="</function_calls>",
    marker="<function_calls>",
    template_pattern=r"<function_calls>",
    style=KeywordArguments(python_words=False),
    tokens=("<function_calls>", "</function_calls>"),
)

_OLMO3_LINES = msgspec.structs.replace(
    _OLMO3,
    first="<function_calls>\n",
    last="\n</function_calls>",
    template_pattern=r"<function_calls>(\\n|\n)",
)

_GRANITE = ToolFormat(
    name="granite",
    first='<|tool_call|>[{"name": "',
    between='", "arguments": ',
    after="}",
    next=', {"name": "',
    last="]",
    marker="<|tool_call|>",
    template_pattern=r"<\|tool_call\|>",
    tokens=("<|tool_call|>",),
)

_PHI4_MINI = msgspec.structs.replace(
    _GRANITE,
    name="phi4_mini",
    last="]<|/tool_call|>",
    template_pattern=r"<\|/tool\|>",
    tokens=("<|tool_call|>", "<|/tool_call|>"),
)

_PHI4_MINI_SINGLE = msgspec.structs.replace(
    _PHI4_MINI,
    first='<|tool_call|>{"name": "',
    after="}<|/tool_call|>",
    next='<|tool_call|>{"name": "',
    last="",
    template_pattern=r"<\|tool_call\|>\{(?s:.*)<\|/tool_call\|>",
)

_PHI4_MINI_FUNCTOOLS = msgspec.structs.replace(
    _PHI4_MINI,
    first='functools[{"name": "',
    last="]",
    marker="functools[",
    template_pattern=r"functools\[",
    tokens=(),
)

_HARMONY = ToolFormat(
    name="harmony",
    first="<|channel|>commentary to=functions.",
    between=" <|constrain|>json<|message|>",
    after="",
    next="<|call|><|start|>assistant<|channel|>commentary to=functions.",
    last="<|call|>",
    marker="<|channel|>",
    template_pattern=r"<\|channel\|>(?s:.*)<\|message\|>",
    tokens=(
        *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
        *("<|end|>", "<|call|>", "<|return|>"),
    ),
    has_channels=True,
)

# The first that a template shows is taken, so the narrower pattern stands first.
FORMATS = (
    *(_HARMONY, _MISTRAL_ARGS, _MISTRAL_NEMO, _MISTRAL),
    *(_DEEPSEEK_V3, _DEEPSEEK_V31, _SEED_OSS, _MINIMAX_M2, _QWEN3_CODER, _GLM47, _GLM45, _HERMES),
    *(_PHI4_MINI_FUNCTOOLS, _PHI4_MINI_SINGLE, _PHI4_MINI, _GRANITE),
    *(_OLMO3_LINES, _OLMO3, _PYTHONIC, _LLAMA3),
)

_DEFAULTS: Mapping[ToolFormatName, ToolFormat] = {
    "hermes": _HERMES,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "qwen3_coder": _QWEN3_CODER,
    "seed_oss": _SEED_OSS,
    "minimax_m2": _MINIMAX_M2,
    "glm45": _GLM45,
    "deepseek_v3": _DEEPSEEK_V3,
    "pythonic": _PYTHONIC,
    "olmo3": _OLMO3,
    "granite": _GRANITE,
    "phi4_mini": _PHI4_MINI,
    "harmony": _HARMONY,
}

DEFAULT_FORMAT = _HERMES
"""For models that know no format: the one with the clearest marks."""


def find_format(chosen: ToolFormatChoice, template: str | None) -> ToolFormat | None:
    """The format of that name, or with "auto" the one that the chat template's source shows; None where it shows none.

    A family's formats differ in details that the template decides in either case.
    """
    shown = (form for form in FORMATS if template is not None and re.search(form.template_pattern, template))
    found = next((form for form in shown if chosen in ("auto", form.name)), None)
    if found is not None or chosen == "auto":
        return found
    return _DEFAULTS[chosen]
