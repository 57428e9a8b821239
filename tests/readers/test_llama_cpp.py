"""llama.cpp computes what we compute from the same file, and its converter reads the folders that are written here."""

import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.file import GgufFile, Value
from cllm_core.training.config import DataConfig, ModelConfig, SftConfig, WeightsConfig
from cllm_core.training.run import run_sft
from tests.checkpoints import write_gguf
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import CONFIGS, write_model
from tests.models.conftest import Load, load  # noqa: F401 - a fixture here, too
from tests.models.gguf.test_round_trip import MAX_DIFFERENCE
from tests.models.gguf.test_tokenizer import (
    corpus,
    export_byte_level,
    read,
    train_byte_level,
    train_sentencepiece,
    write_sentencepiece,
)
from tests.readers.llama_cpp import CONVERTER, SERVER, ask, compare, convert, llama_server, write_for_converter
from tests.training.factories import make_run, no_progress, write_questions

MAX_GELU_DIFFERENCE = 0.02  # nats; llama.cpp looks the GELU up in a table of float16
WITH_GELU = ("gemma", "starcoder")
WITHOUT_WINDOW = "phi-3-windowed"  # which llama.cpp leaves out
WITHOUT_FACTORS = "llama-longrope"  # which the converter leaves out

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER is None, reason="LLAMA_SERVER does not name llama.cpp's server"),
]
needs_converter = pytest.mark.skipif(CONVERTER is None, reason="LLAMA_CONVERTER names no convert_hf_to_gguf.py")


def require_equal(name: str, folder: Path, file: Path) -> None:
    found = compare(folder, file)
    assert found.to_folder < MAX_DIFFERENCE
    assert found.to_llama_cpp < (MAX_GELU_DIFFERENCE if name.startswith(WITH_GELU) else MAX_DIFFERENCE)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != WITHOUT_WINDOW])
def test_llama_cpp_computes_the_same_from_our_file(
    export: Export,  # noqa: F811 - the fixture
    tmp_path: Path,
    name: str,
) -> None:
    folder = write_model(tmp_path / "folder", name)
    require_equal(name, folder, export(folder, tmp_path / "model.gguf", format="gguf"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every model as its makers publish it."""
    root = tmp_path_factory.mktemp("folders")
    return {name: write_for_converter(root / name, name) for name in CONFIGS}


@pytest.fixture(scope="module")
def converted(folders: Mapping[str, Path]) -> Mapping[str, Path]:
    """Files of them by llama.cpp's converter."""
    files = {name: folder.with_name(f"{name}.gguf") for name, folder in folders.items()}
    convert({folders[name]: file for name, file in files.items()})
    return files


@needs_converter
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in (WITHOUT_WINDOW, WITHOUT_FACTORS)])
def test_a_file_of_the_converter_computes_what_its_folder_does(
    folders: Mapping[str, Path], converted: Mapping[str, Path], name: str
) -> None:
    require_equal(name, folders[name], converted[name])


@needs_converter
def test_a_file_that_the_converter_writes_without_its_factors_is_refused(
    load: Load,  # noqa: F811 - the fixture
    converted: Mapping[str, Path],
) -> None:
    with pytest.raises(ModelLoadError, match="longrope', but the file has no factors"):
        load(converted[WITHOUT_FACTORS])


@needs_converter
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != WITHOUT_FACTORS])
def test_a_file_of_the_converter_has_the_tokenizer_of_its_folder(
    load: Load,  # noqa: F811 - the fixture
    folders: Mapping[str, Path],
    converted: Mapping[str, Path],
    name: str,
) -> None:
    expected, found = (
        Tokenizer.from_str(load(path).tokenizer.tokenizer_json).encode_batch(corpus(), add_special_tokens=False)
        for path in (folders[name], converted[name])
    )
    assert [encoding.ids for encoding in found] == [encoding.ids for encoding in expected]


@needs_converter
def test_the_converter_reads_an_exported_folder_as_the_original(
    export: Export,  # noqa: F811 - the fixture
    folders: Mapping[str, Path],
    converted: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    files = {name: tmp_path / f"{name}.gguf" for name in folders}
    convert({export(folder, tmp_path / name): files[name] for name, folder in folders.items()})
    for name, file in files.items():
        require_equal_content(file, converted[name])


def require_equal_content(path: Path, other: Path) -> None:
    """Beside what the file says about where it comes from."""
    first, second = GgufFile(path), GgufFile(other)
    assert comparable(first.values) == comparable(second.values)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.data, second.tensors[name].data)


def comparable(values: Mapping[str, Value]) -> dict[str, object]:
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in values.items()
        if not key.startswith("general.") or key.startswith("general.architecture")
    }


@needs_converter
def test_the_converter_reads_fully_trained_weights(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run_sft(
        SftConfig(
            model=ModelConfig(model=str(tiny_llama), output=tmp_path / "out"),
            data=DataConfig(data=str(write_questions(tmp_path))),
            run=make_run(epochs=1.0),
            weights=WeightsConfig(full=True),
        ),
        no_progress,
    )
    convert({folder: tmp_path / "trained.gguf"})
    require_equal("llama", folder, tmp_path / "trained.gguf")


@pytest.mark.parametrize("word", ["gpt-2", "smollm", "starcoder", "llama-bpe", "dbrx", "stablelm2", "deepseek-coder"])
def test_llama_cpp_splits_texts_alike(
    export: Export,  # noqa: F811 - the fixture
    tmp_path: Path,
    word: str,
) -> None:
    """Those that llama.cpp does not approximate, on texts that look the same composed or not."""
    path = export_byte_level(export, tmp_path, word, train_byte_level(word))
    texts = [text for text in corpus()[:400] if unicodedata.is_normalized("NFC", text)]
    require_equal_ids(path, texts)


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_reads_sentencepiece_files_alike(tiny_llama: Path, tmp_path: Path, prefix: bool) -> None:
    model = train_sentencepiece([], prefix=prefix)
    base = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    path = write_sentencepiece(tmp_path / "spm.gguf", base, model, [], prefix=prefix)
    require_equal_ids(path, corpus()[:400])


def require_equal_ids(path: Path, texts: list[str]) -> None:
    ours = read(path)
    with llama_server(path, 256) as address:
        for text in texts:
            theirs = ask(address, "tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
            assert ours.encode(text, add_special_tokens=False).ids == theirs, text
