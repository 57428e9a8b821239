"""Chat formats of the common model families in small: templates, and tokenizers that own the tokens they write.

The templates in `families/` were written for these tests. They write the tokens of their family in its order and use
the operations on texts that its templates use, in other code and with other prose.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cllm_core.info import TokenizerBundle
from cllm_core.models.tokenizer import build_bundle
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec

_TEMPLATES = Path(__file__).parent / "families"

# What the little vocabularies are trained on: merges reach over line breaks, spaces and punctuation.
_CORPUS = [
    "Hello there!\n\nWhat is a <table> in HTML? It holds rows, [cells] and {values}.\n\n",
    'user\nassistant\nsystem\n{"name": "look", "arguments": {"where": "here"}}\n\n' * 3,
    "<|im_start|> and <|im_end|> are written with <| and |> | as are others: [INST] [/INST] <s> </s>\n" * 3,
    "Grüße, 日本, the quick brown fox jumps over the lazy dog.  Two  spaces.\tA tab.\n\n\n",
]

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """One family: how its tokenizer is made and which tokens it adds.

    Attributes:
        name: of the template's file.
        build: the tokenizer without added tokens.
        special, marks, tags: added tokens. Marks are control tokens that are not special, tags ordinary text.
    """

    name: str
    build: Callable[[], Tokenizer]
    special: tuple[AddedToken, ...]
    marks: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = ""
    has_tools: bool = False
    has_system: bool = True

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return (*(token.content for token in self.special), *self.marks)


@dataclass(frozen=True)
class ChatModel:
    """A family's tokenizer, as transformers has it and as we have it."""

    family: Family
    reference: PreTrainedTokenizerFast
    bundle: TokenizerBundle
    template: ChatTemplate
    codec: TextCodec

    @property
    def control_ids(self) -> frozenset[int]:
        ids = [self.codec.added_token_id(text) for text in self.family.control_tokens]
        return frozenset(token_id for token_id in ids if token_id is not None)


@cache
def load(name: str) -> ChatModel:
    family = FAMILIES[name]
    tokenizer = family.build()
    tokenizer.add_special_tokens(list(family.special))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*family.marks, *family.tags)])
    source = (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, chat_template=source
    )
    bundle = build_bundle(reference, model_name=name)
    template = ChatTemplate.of(bundle)
    assert template is not None
    return ChatModel(family, reference, bundle, template, TextCodec(bundle))


def _byte_level() -> Tokenizer:
    """GPT-4's manner: a regex cuts words, bytes are the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentence_piece() -> Tokenizer:
    """Sentencepiece BPE with byte fallback, without what prepares a text for it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *model["vocab"]]
    vocabulary = {word: token_id for token_id, word in enumerate(dict.fromkeys(words))}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _llama_2() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _mistral() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _gemma() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def _special(*texts: str, **options: bool) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(text, special=True, **{"normalized": False, **options}) for text in texts)


_CHATML = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK_TAGS = ("<think>", "</think>")
_GEMMA = _special("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
_GEMMA_TAGS = ("\n\n", "\n\n\n", "▁▁", "<table>", "</table>", "<b>")
_DEEPSEEK_TOOLS = [
    f"<｜tool▁{what}｜>"
    for what in (
        *("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"),
        *("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"),
    )
]

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama3",
            _byte_level,
            _special("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            has_tools=True,
        ),
        Family("qwen2_5", _byte_level, _CHATML, tags=_TOOL_TAGS, eos="<|im_end|>", has_tools=True),
        Family("qwen3", _byte_level, _CHATML, tags=(*_TOOL_TAGS, *_THINK_TAGS), eos="<|im_end|>", has_tools=True),
        Family("smollm2", _byte_level, _CHATML, bos="<|im_start|>", eos="<|im_end|>"),
        Family(
            "mistral",
            _mistral,
            _special(
                *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
                *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            ),
            bos="<s>",
            eos="</s>",
            has_tools=True,
        ),
        Family("gemma2", _gemma, _GEMMA, tags=_GEMMA_TAGS, bos="<bos>", eos="<eos>", has_system=False),
        Family("gemma3", _gemma, _GEMMA, tags=_GEMMA_TAGS, bos="<bos>", eos="<eos>"),
        Family(
            "phi3",
            _llama_2,
            (
                *_special("<s>", "<|endoftext|>"),
                *_special("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True),
            ),
            eos="<|endoftext|>",
        ),
        Family(
            "phi4_mini",
            _byte_level,
            _special("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|tool|>", "<|/tool|>"),
            eos="<|endoftext|>",
        ),
        Family(
            "deepseek",
            _byte_level,
            _special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
            marks=("<｜User｜>", "<｜Assistant｜>", *_DEEPSEEK_TOOLS),
            tags=_THINK_TAGS,
            bos="<｜begin▁of▁sentence｜>",
            eos="<｜end▁of▁sentence｜>",
            has_tools=True,
        ),
        Family("vicuna", _llama_2, _special("<s>", "</s>"), bos="<s>", eos="</s>"),
    )
}
