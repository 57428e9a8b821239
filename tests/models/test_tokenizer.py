"""The bundle gives the ids of transformers without transformers, and templates give the formats of the training."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, processors
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizer, PreTrainedTokenizerFast

from cllm_core.errors import ModelLoadError
from cllm_core.models.chat_templates import builtin_template
from cllm_core.models.checkpoint import Checkpoint, read_tokenizer
from cllm_core.models.tokenizer import build_bundle
from tests.checkpoints import CHATML_TEMPLATE, build_tokenizer

TEXTS = ["", "The next token", "  naïve\n\tcafé 日本語 🙂 ", "<|im_start|>user\nhi<|im_end|>", "a" * 600]
QUESTION = [{"role": "user", "content": "How many?"}]


def ids_by_bundle(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    backend = Tokenizer.from_str(build_bundle(tokenizer, model_name="tiny").tokenizer_json)
    return [backend.encode(text).ids for text in TEXTS]


def add_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], template: str | None) -> str:
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    )


@pytest.mark.parametrize("with_bos", [False, True])
def test_bundle_encodes_as_transformers_does(with_bos: bool) -> None:
    tokenizer = build_tokenizer()
    if with_bos:
        add_bos(tokenizer)
    ids = ids_by_bundle(tokenizer)
    assert ids == [tokenizer(text).input_ids for text in TEXTS]
    assert all((row[:1] == [1]) == with_bos for row in ids[:3])


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path: Path) -> None:
    """A tokenizer.json may carry both from its training run; transformers does not apply them by default."""
    build_tokenizer().save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ids_by_bundle(tokenizer) == [tokenizer(text).input_ids for text in TEXTS]


def test_sentencepiece_style_tokenizer_encodes_as_transformers_does() -> None:
    """Llama's: spaces become ▁, unknown characters become bytes, and a BOS comes first."""
    letters = {piece: 3 + 256 + i for i, piece in enumerate(["▁", "t", "h", "e", "th", "the", "▁the"])}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | letters
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = token_decoders.Sequence([token_decoders.Replace("▁", " "), token_decoders.ByteFallback()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ids = ids_by_bundle(tokenizer)
    assert ids == [tokenizer(text).input_ids for text in TEXTS]
    assert all(row[0] == 1 and 0 not in row for row in ids)


def test_tokenizer_model_without_tokenizer_json_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    """The form of early Llama checkpoints."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the next token and the one after the next token"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    settings: dict[str, object] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(Checkpoint(tmp_path), LlamaConfig())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    backend = Tokenizer.from_str(build_bundle(tokenizer, model_name="tiny").tokenizer_json)
    for text in ("the next token", "naïve 日本 🙂", "after\nthe one"):
        assert backend.encode(text).ids == [1, *reference.encode(text)] == tokenizer(text).input_ids


def test_bundle_carries_template_and_special_tokens() -> None:
    bundle = build_bundle(build_tokenizer(), model_name="tiny")
    assert bundle.chat_template == CHATML_TEMPLATE
    assert bundle.special_tokens["bos_token"] == "<|im_start|>"
    assert bundle.special_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("templates", "chosen"),
    [
        ({"default": "plain", "tool_use": "tools"}, "plain"),
        ({"chat": "only"}, "only"),
        ({"a": "one", "b": "two"}, None),
        (None, None),
    ],
)
def test_of_several_templates_the_default_is_taken(templates: dict[str, str] | None, chosen: str | None) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = templates
    assert build_bundle(tokenizer, model_name="tiny").chat_template == chosen


def test_template_file_beside_the_tokenizer_is_taken(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert build_bundle(tokenizer, model_name="tiny").chat_template == "from the file"


def test_tokenizer_without_a_fast_form_is_refused() -> None:
    class InPython(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

        def _tokenize(self, text: str, **kwargs: object) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return 0

        def _convert_id_to_token(self, index: int) -> str:
            return ""

    with pytest.raises(ModelLoadError, match=r"InPython\) is Python code"):
        build_bundle(InPython(), model_name="tiny")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "sharegpt48k",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: How many? ASSISTANT:",
        ),
        ("math", "Question:\nHow many?\nAnswer:\nLet's think step by step.\n"),
        (
            "spider",
            "### Instruction:\nCould you translate the following question into SQL. Please only generate SQL, "
            "don't include explanation in the answer. How many?\n### Response:\n",
        ),
        (
            "codesearchnet",
            "### Instruction:\nPlease generate code based on the following doc:\nHow many?\n### Response:\n",
        ),
    ],
)
def test_published_cllms_get_the_prompt_format_of_their_training(name: str, prompt: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    bundle = build_bundle(tokenizer, model_name=f"cllm/consistency-llm-7b-{name}")
    rendered = render(tokenizer, QUESTION, bundle.chat_template)
    assert rendered == "<|im_start|>" + prompt


@pytest.mark.parametrize("name", ["sharegpt48k", "math", "spider", "codesearchnet"])
def test_later_turns_repeat_the_format_and_close_answers_with_eos(name: str) -> None:
    template = builtin_template(f"cllm/consistency-llm-7b-{name}")
    tokenizer = build_tokenizer()
    turns = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "Two."}, *QUESTION]
    rendered = render(tokenizer, turns, template)
    assert rendered.startswith("<|im_start|>Be brief.")
    assert rendered.count("<|im_end|>") == 1
    assert rendered.index("How many?") < rendered.index("Two.") < rendered.index("<|im_end|>")
    assert rendered.count("How many?") == 2


def test_own_template_wins_over_the_built_in_one() -> None:
    bundle = build_bundle(build_tokenizer(), model_name="cllm/consistency-llm-7b-math")
    assert bundle.chat_template == CHATML_TEMPLATE
    assert builtin_template("owner/other") is None


def test_tokenizer_json_is_plain_json() -> None:
    assert json.loads(build_bundle(build_tokenizer(), model_name="tiny").tokenizer_json)["truncation"] is None


@pytest.mark.parametrize("is_limited", [True, False])
def test_limits_of_a_training_run_are_left_out_of_the_bundle_and_stay_with_the_tokenizer(is_limited: bool) -> None:
    tokenizer = build_tokenizer()
    if is_limited:
        tokenizer.backend_tokenizer.enable_truncation(max_length=4)
        tokenizer.backend_tokenizer.enable_padding(length=8)
    before = tokenizer.backend_tokenizer.to_str()
    bundle = json.loads(build_bundle(tokenizer, model_name="tiny").tokenizer_json)
    assert (bundle["truncation"], bundle["padding"]) == (None, None)
    assert tokenizer.backend_tokenizer.to_str() == before
