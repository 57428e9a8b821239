"""The tokenizer of a file is the model's own, on texts of many kinds."""

import io
import itertools
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.file import GgufFile, Value
from cllm_core.models.gguf.splitting import SPLITTINGS
from cllm_core.models.gguf.tokenizer import read_gguf_tokenizer
from tests.checkpoints import build_model, write_gguf
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.models.gguf.editing import edit_gguf

DOCS = Path(__file__).parents[3] / "docs"
RANGES = [(32, 126), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x4FF), (0x5D0, 0x6FF), (0x900, 0x97F), (0x3040, 0x30FF)]
RANGES += [(0x4E00, 0x5FFF), (0xAC00, 0xB000), (0x1F300, 0x1F6FF), (0x2000, 0x206F), (9, 13), (32, 33)]
PIECES = [
    "don't",
    "WE'LL",
    " 12345",
    "1 000.5",
    "naïve",
    "e\u0301",
    "日本語",
    "\r\n",
    "\t\t",
    "  ",
    "\n\n\n",
    "🙂",
    "x=y;",
    "!!",
]


def corpus() -> list[str]:
    """Prose, code, every pair of some awkward pieces, and random characters of many scripts."""
    prose = [
        line
        for page in ("explanation/decoding.md", "reference/api.md")
        for line in (DOCS / page).read_text().split("\n")
    ]
    pairs = ["".join(pair) for pair in itertools.product(PIECES, repeat=2)]
    runs = [" " * count + "x" + "\n" * count + "y" for count in range(40)]
    chance = random.Random(0)
    noise = [
        "".join(chr(chance.randint(*chance.choice(RANGES))) for _ in range(chance.randint(1, 20))) for _ in range(500)
    ]
    return ["", *prose, *pairs, *runs, *noise]


def spellings(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text."""
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def write_folder(folder: Path, backend: Tokenizer, **special: str) -> Path:
    """A tiny Llama with this tokenizer."""
    build_model("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def read(path: Path) -> Tokenizer:
    return read_gguf_tokenizer(GgufFile(path)).backend_tokenizer


def train_byte_level(word: str) -> Tokenizer:
    """A tokenizer of 384 tokens that splits texts so."""
    splitting = SPLITTINGS[word]
    backend = Tokenizer(models.BPE(ignore_merges=splitting.whole_words))
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    if (normalizer := splitting.normalizer()) is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=383, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return backend


def export_byte_level(export: Export, folder: Path, word: str, backend: Tokenizer) -> Path:  # noqa: F811
    """The tiny Llama with this tokenizer as a GGUF file."""
    source = write_folder(folder / "source", backend, bos_token="<|begin|>", eos_token="<|end|>")
    path = export(source, folder / "tiny.gguf", format="gguf", dtype="f32")
    return edit_gguf(path, folder / "named.gguf", {"tokenizer.ggml.pre": word})  # several words mean the same


@pytest.mark.parametrize("word", SPLITTINGS)
def test_byte_level_tokenizers_give_the_ids_of_the_folder(
    export: Export,  # noqa: F811 - the fixture
    tmp_path: Path,
    word: str,
) -> None:
    backend = train_byte_level(word)
    ours = read(export_byte_level(export, tmp_path, word, backend))
    texts = [*corpus(), "a<think>b <|end|> c"]
    ids = spellings(ours, texts)
    assert ids == spellings(backend, texts)
    assert ours.decode_batch(ids) == backend.decode_batch(ids)


def train_sentencepiece(user_defined: list[str], *, prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """A BPE model of 384 pieces, which can spell any text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in corpus()[:300] if text),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        user_defined_symbols=user_defined,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentencepiece(
    path: Path, base: Path, model: sentencepiece.SentencePieceProcessor, user_defined: list[str], *, prefix: bool
) -> Path:
    """The file `base` with this tokenizer, as llama.cpp's converter writes it."""
    pieces = [model.id_to_piece(piece_id) for piece_id in range(model.get_piece_size())]
    kinds = []
    for piece_id, piece in enumerate(pieces):
        if model.is_unknown(piece_id):
            kinds.append(gguf.TokenType.UNKNOWN)
        elif model.is_control(piece_id):
            kinds.append(gguf.TokenType.CONTROL)
        elif model.is_byte(piece_id):
            kinds.append(gguf.TokenType.BYTE)
        else:
            kinds.append(gguf.TokenType.USER_DEFINED if piece in user_defined else gguf.TokenType.NORMAL)
    keys: dict[str, Value | None] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.replace("▁", " ") if piece in user_defined else piece for piece in pieces],
        "tokenizer.ggml.scores": np.array([model.get_score(piece_id) for piece_id in range(len(pieces))], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_bos_token": False,
    }
    return edit_gguf(base, path, keys)


@pytest.mark.parametrize(
    ("user_defined", "prefix"), [([], True), (["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<tag>"], False)]
)
def test_sentencepiece_files_give_the_ids_of_sentencepiece(
    tiny_llama: Path, tmp_path: Path, user_defined: list[str], prefix: bool
) -> None:
    model = train_sentencepiece(user_defined, prefix=prefix)
    base = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    ours = read(write_sentencepiece(tmp_path / "spm.gguf", base, model, user_defined, prefix=prefix))
    texts = [text for text in [*corpus(), "a <tag>  b"] if "</s>" not in text]  # that is a token here
    ids = spellings(ours, texts)
    assert ids == model.encode(texts)
    assert ours.decode_batch(ids) == model.decode(ids)


@pytest.mark.parametrize(("user_defined", "prefix"), [([], True), (["\n\n", "▁▁", "▁▁▁", "<tag>"], False)])
def test_sentencepiece_tokenizers_survive_an_export(
    export: Export,  # noqa: F811 - the fixture
    tiny_llama: Path,
    tmp_path: Path,
    user_defined: list[str],
    prefix: bool,
) -> None:
    model = train_sentencepiece(user_defined, prefix=prefix)
    base = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    path = write_sentencepiece(tmp_path / "spm.gguf", base, model, user_defined, prefix=prefix)
    again = export(export(path, tmp_path / "folder"), tmp_path / "again.gguf", format="gguf")
    first, second = GgufFile(path).values, GgufFile(again).values
    assert second["tokenizer.ggml.tokens"] == first["tokenizer.ggml.tokens"]
    assert np.array_equal(second["tokenizer.ggml.token_type"], first["tokenizer.ggml.token_type"])
    assert spellings(read(again), corpus()) == spellings(read(path), corpus())


def test_merges_that_are_not_those_of_sentencepiece_are_refused(
    export: Export,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    """llama.cpp merges any two tokens that spell a third; a tokenizer that was trained with merges does not."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=384, limit_alphabet=100, special_tokens=["<unk>"], show_progress=False)
    )
    folder = write_folder(tmp_path / "folder", backend)
    with pytest.raises(ModelLoadError, match="merges in an order that does not follow from its tokens"):
        export(folder, tmp_path / "tiny.gguf", format="gguf")
