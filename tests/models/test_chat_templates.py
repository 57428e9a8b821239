"""Which chat template a model gets, and the formats that come with the package."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models.chat_templates import ChatTemplates, find_templates, template_names
from cllm_core.models.loader import load_model
from cllm_core.models.tokenizer import build_bundle
from cllm_core.text.chat_template import ChatTemplate
from tests.checkpoints import build_tokenizer

TALK: list[dict[str, object]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# As the makers of each format document it: a talk with a system message, and a first question without one.
FORMATS = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
        "<s>[INST] Hi [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]", "<s>[INST] Hi [/INST]"),
    "vicuna": (
        "<s>Be kind. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:",
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:",
    ),
    "alpaca": (
        "<s>Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
        f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\n",
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    ),
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        "<|user|>\nHi</s>\n<|assistant|>\n",
    ),
}

WEATHER: dict[str, object] = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_named_template_writes_the_format_of_that_name(name: str) -> None:
    source = find_templates(build_tokenizer(), model_name="tiny", chosen=name).default
    assert source is not None
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert (template.render(TALK).text, template.render(TALK[1:2]).text) == FORMATS[name]


def test_the_published_cllms_have_templates_by_name_too() -> None:
    assert set(template_names()) == {*FORMATS, "math", "spider", "codesearchnet"}


def test_the_template_that_was_chosen_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Grüße {{ messages[0].content }}", encoding="utf-8")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": "own", "tool_use": "own"}
    chosen = find_templates(tokenizer, model_name="tiny", chosen=str(tmp_path / "mine.jinja"))
    assert chosen == ChatTemplates(default="Grüße {{ messages[0].content }}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_choice_that_is_no_template_is_refused_with_the_names(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "nothing"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"^chat_template=.*nothing: .* one of alpaca, chatml, .*zephyr$"):
        find_templates(build_tokenizer(), model_name="tiny", chosen=str(path))


def test_a_chosen_template_is_that_of_the_loaded_model(tiny_llama: Path) -> None:
    loaded = load_model(EngineConfig(model=str(tiny_llama), chat_template="zephyr"), lambda stage, fraction: None)
    assert loaded.tokenizer.chat_template == find_templates(build_tokenizer(), model_name="", chosen="zephyr").default


def save_with(folder: Path, template: object) -> None:
    """A tokenizer whose tokenizer_config.json has this chat template."""
    build_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))


def in_config(folder: Path) -> None:
    save_with(folder, [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0] }}"}])


def in_folder(folder: Path) -> None:
    save_with(folder, None)
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0] }}")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")


@pytest.mark.parametrize("save", [in_config, in_folder])
@pytest.mark.parametrize("tools", [None, [WEATHER]])
def test_named_templates_are_picked_as_transformers_picks_them(
    tmp_path: Path, save: Any, tools: list[dict[str, object]] | None
) -> None:
    save(tmp_path)
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(tmp_path))
    template = ChatTemplate.of(build_bundle(tokenizer, model_name="tiny"))
    assert template is not None
    expected = tokenizer.apply_chat_template(cast(Any, TALK), tools=cast(Any, tools), tokenize=False)
    assert template.render(TALK, tools).text == expected
    assert template.handles_tools
    assert template.source == "{{ tools[0] }}"


def test_the_template_of_a_processor_is_taken_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    save_with(tmp_path, None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    bundle = build_bundle(AutoTokenizer.from_pretrained(tmp_path), model_name="tiny")
    assert bundle.chat_template == "of the processor"
    in_config(tmp_path)
    assert build_bundle(AutoTokenizer.from_pretrained(tmp_path), model_name="tiny").chat_template == "plain"


@pytest.mark.parametrize("template", [5, 1.5, True, {"default": 5}, {"default": None}])
def test_a_template_that_is_no_text_is_refused_in_a_line(tmp_path: Path, template: object) -> None:
    save_with(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"^tiny: its chat template must be a text, .*choose another with [^\n]*$"):
        build_bundle(tokenizer, model_name="tiny")


@pytest.mark.parametrize(
    "template", ["{% for", [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "{% if"}]]
)
def test_a_template_that_does_not_compile_is_refused_in_a_line(tmp_path: Path, template: object) -> None:
    save_with(tmp_path, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"^tiny: chat template, line 1: [^\n]*$"):
        build_bundle(tokenizer, model_name="tiny")


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 7}'])
def test_a_broken_file_of_a_processor_is_refused_in_a_line(tmp_path: Path, content: str) -> None:
    save_with(tmp_path, None)
    (tmp_path / "chat_template.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"chat.template[^\n]*; correct[^\n]*$"):
        build_bundle(AutoTokenizer.from_pretrained(tmp_path), model_name="tiny")


def test_several_templates_without_a_default_are_none(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"a": "one", "b": "two"}
    with caplog.at_level(logging.WARNING):
        assert find_templates(tokenizer, model_name="tiny") == ChatTemplates()
    assert "none of the chat templates ['a', 'b'] is called default" in caplog.text
