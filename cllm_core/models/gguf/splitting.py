r"""How byte-level BPE tokenizers cut a text into words before merging: GGUF says it by a word, `tokenizer.ggml.pre`.

The patterns are those of the models' own tokenizer.json files. llama.cpp has them in its own spelling and without the
normalisation that some of the files ask for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, normalizers, pre_tokenizers

_GPT4: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER: Final = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O: Final = (
    rf"{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3: Final = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")


@dataclass(frozen=True, slots=True)
class Splitting:
    """The steps, in order.

    Attributes:
        digits: every digit is a word.
        patterns: a match is a word, and so is what lies between two.
        gpt2_words: the rest is cut by GPT-2's pattern.
        whole_words: a word that is a token is not merged together, but taken.
        begins: the text begins with bos, unless the file says otherwise.
        composes: the text is brought into Unicode's NFC form.
    """

    digits: bool = False
    patterns: tuple[str, ...] = ()
    gpt2_words: bool = False
    whole_words: bool = False
    begins: bool = False
    composes: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The steps, and then bytes in GPT-2's spelling."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns
        ]
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2_words))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """What happens to the text before, None for nothing."""
        return normalizers.NFC() if self.composes else None


_GPT2_WORDS: Final = Splitting(gpt2_words=True)
_DIGITS: Final = Splitting(digits=True, gpt2_words=True)
_LLAMA3: Final = Splitting(patterns=(_GPT4,), whole_words=True, begins=True)
_QWEN: Final = Splitting(patterns=(_QWEN2,), composes=True)

SPLITTINGS: Final[Mapping[str, Splitting]] = {
    "gpt-2": _GPT2_WORDS,
    "phi-2": _GPT2_WORDS,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": Splitting(patterns=(_GPT4,)),
    "smaug-bpe": Splitting(patterns=(_GPT4,)),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "megrez": _QWEN,
    "stablelm2": Splitting(patterns=(_QWEN2,)),
    "tekken": Splitting(patterns=(_TEKKEN,), whole_words=True, begins=True),
    "gpt-4o": Splitting(patterns=(_GPT4O,)),
    "deepseek-v3": Splitting(patterns=_DEEPSEEK_V3),
    "deepseek-coder": Splitting(patterns=_DEEPSEEK_CODER, digits=True),
}
