"""How models mark what they think before they answer: one ReasoningFormat per family of models.

    <think>\\nThe user greets.\\n</think>\\n\\nHello!        start, reasoning, end, answer

Many chat templates write `start` themselves, at the end of the prompt; some write both tags where a client wants no
reasoning.
"""

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

ReasoningFormatName = Literal[
    "think", "granite", "hunyuan", "mistral", "seed", "kimi_vl", "gemma", "command", "harmony"
]
ReasoningFormatChoice = Literal["auto", "none", ReasoningFormatName]

# What a template may write behind the tags where there is to be no reasoning, or only little.
_BEHIND_START = ("<seed:cot_budget_reflect>",)


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The tags of a family.

    Attributes:
        template_pattern: regex; it is found in the chat templates of the family.
        answer_start, answer_end: that may stand around the answer behind the reasoning.
        tokens: strings in the format that many vocabularies have as tokens of their own.
        has_channels: reasoning, content and calls are messages of their own, on channels (`harmony`), without tags.
    """

    name: ReasoningFormatName
    start: str = ""
    end: str = ""
    template_pattern: str
    answer_start: str = ""
    answer_end: str = ""
    tokens: tuple[str, ...] = ()
    has_channels: bool = False


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """What to expect of one output.

    Attributes:
        state: "open" where the prompt has begun the reasoning, so that the output goes on with it; "possible" where the
            output may begin some; "ended" where the prompt has ended it.
    """

    format: ReasoningFormat
    state: Literal["open", "possible", "ended"]

    @property
    def is_over(self) -> bool:
        """Whether the output is all answer, without tags around it."""
        return self.state == "ended" and not self.format.answer_start


_THINK = ReasoningFormat(
    name="think", start="<think>", end="</think>", template_pattern=r"</?think>", tokens=("<think>", "</think>")
)

_GRANITE = msgspec.structs.replace(
    _THINK,
    name="granite",
    template_pattern=r"<response></response>",
    answer_start="<response>",
    answer_end="</response>",
    tokens=("<think>", "</think>", "<response>", "</response>"),
)

_GRANITE_WORDS = ReasoningFormat(
    name="granite",
    start="Here is my thought process:",
    end="Here is my response:",
    template_pattern=r"Here is my thought process:",
)

_HUNYUAN = msgspec.structs.replace(
    _THINK,
    name="hunyuan",
    template_pattern=r"</answer>",
    answer_start="<answer>",
    answer_end="</answer>",
    tokens=("<think>", "</think>", "<answer>", "</answer>"),
)

_MISTRAL = ReasoningFormat(
    name="mistral", start="[THINK]", end="[/THINK]", template_pattern=r"\[THINK\]", tokens=("[THINK]", "[/THINK]")
)

_SEED = ReasoningFormat(
    name="seed",
    start="<seed:think>",
    end="</seed:think>",
    template_pattern=r"<seed:think>",
    tokens=("<seed:think>", "</seed:think>"),
)

_KIMI_VL = ReasoningFormat(
    name="kimi_vl", start="◁think▷", end="◁/think▷", template_pattern=r"◁/?think▷", tokens=("◁think▷", "◁/think▷")
)

_GEMMA = ReasoningFormat(
    name="gemma",
    start="<|channel>thought\n",
    end="<channel|>",
    template_pattern=r"<\|channel>",
    tokens=("<|channel>", "<channel|>"),
)

_COMMAND = ReasoningFormat(
    name="command",
    start="<|START_THINKING|>",
    end="<|END_THINKING|>",
    template_pattern=r"<\|START_THINKING\|>",
    answer_start="<|START_RESPONSE|>",
    answer_end="<|END_RESPONSE|>",
    tokens=("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)

_HARMONY = ReasoningFormat(
    name="harmony",
    template_pattern=r"<\|channel\|>(?s:.*)<\|message\|>",
    tokens=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
    has_channels=True,
)

# The first that a template shows is taken, so the narrower pattern stands first.
REASONING_FORMATS = (
    *(_HARMONY, _GEMMA, _SEED, _MISTRAL, _COMMAND, _KIMI_VL),
    *(_GRANITE, _GRANITE_WORDS, _HUNYUAN, _THINK),
)

_DEFAULTS: Mapping[ReasoningFormatName, ReasoningFormat] = {
    "think": _THINK,
    "granite": _GRANITE,
    "hunyuan": _HUNYUAN,
    "mistral": _MISTRAL,
    "seed": _SEED,
    "kimi_vl": _KIMI_VL,
    "gemma": _GEMMA,
    "command": _COMMAND,
    "harmony": _HARMONY,
}


def find_reasoning_format(chosen: ReasoningFormatChoice, template: str | None) -> ReasoningFormat | None:
    """The format of that name, or with "auto" the one that the chat template's source shows; None for none.

    A family's formats differ in details that the template decides in either case.
    """
    if chosen == "none":
        return None
    shown = (form for form in REASONING_FORMATS if template is not None and re.search(form.template_pattern, template))
    found = next((form for form in shown if chosen in ("auto", form.name)), None)
    if found is not None or chosen == "auto":
        return found
    return _DEFAULTS[chosen]


def expect_reasoning(format: ReasoningFormat, prompt: str, continued: str | None = None) -> Reasoning:
    """What to expect behind a prompt, of which `continued` is the beginning of an answer, None for none."""
    if continued is not None and not format.has_channels:
        is_open = continued.rfind(format.start) > continued.rfind(format.end)
        return Reasoning(format=format, state="open" if is_open else "ended")
    tail = prompt.rstrip()
    for text in _BEHIND_START:
        tail = tail.removesuffix(text)
    if format.has_channels:
        is_open = tail.endswith("<|channel|>analysis<|message|>")
        return Reasoning(format=format, state="open" if is_open else "possible")
    if tail.removesuffix(format.answer_start).rstrip().endswith(format.end):
        return Reasoning(format=format, state="ended")
    return Reasoning(format=format, state="open" if tail.endswith(format.start.rstrip()) else "possible")
