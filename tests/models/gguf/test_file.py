"""The container: number formats, quantisations and models split into several files."""

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cllm_core.errors import ModelLoadError
from cllm_core.models.checkpoint import Checkpoint, read_config, stored_dtype
from cllm_core.models.gguf.checkpoint import stored_gguf_dtype
from cllm_core.models.gguf.file import GgufFile, StoredTensor
from tests.checkpoints import write_gguf
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import write_model
from tests.models.conftest import Load, logits_of, plain_logits
from tests.models.gguf.editing import write_file

QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"]


def write_split(folder: Path, source: Path, count: int) -> list[Path]:
    """The model of `source` in `count` files, named as llama.cpp names them."""
    file = GgufFile(source)
    paths = [folder / f"tiny-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    names = list(file.tensors)
    for number, path in enumerate(paths):
        keys = file.values if number == 0 else {}
        split = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        write_file(path, {**keys, **split}, {name: file.tensors[name] for name in names[number::count]})
    return paths


def test_a_split_model_is_read_whole(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    first, *_ = write_split(tmp_path, write_gguf(tmp_path / "whole" / "tiny.gguf", tiny_llama), 3)
    for named in (first, first.parent):
        assert torch.equal(logits_of(load(named).model), plain_logits(tiny_llama))


def test_a_part_that_is_missing_is_named(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    first, second, third = write_split(tmp_path, write_gguf(tmp_path / "whole" / "tiny.gguf", tiny_llama), 3)
    with pytest.raises(ModelLoadError, match=r"name the one ending in -00001-of-00003\.gguf"):
        load(second)
    third.unlink()
    with pytest.raises(ModelLoadError, match=r"its part tiny-00003-of-00003\.gguf is not beside it"):
        load(first)


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tensors_are_decoded_as_the_library_decodes_them(tmp_path: Path, kind: str) -> None:
    """K-quants, which the library cannot make, are random bytes of the right size."""
    quantisation = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(300, 256)).astype(np.float32)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    if kind.endswith("K"):
        data = np.random.default_rng(1).integers(0, 60, (300, 256 // block_values * block_bytes), np.uint8)
    else:
        data = gguf.quantize(values, quantisation)
    write_file(tmp_path / "file.gguf", {}, {"matrix": StoredTensor((300, 256), quantisation, data)})
    stored = GgufFile(tmp_path / "file.gguf").tensors["matrix"]
    assert (stored.shape, stored.dtype) == ((300, 256), None)
    expected = torch.from_numpy(gguf.dequantize(data, quantisation))
    assert torch.equal(stored.decode(), expected)
    assert torch.equal(stored.decode(torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_an_unquantised_file_is_served_in_its_own_precision(
    export: Export,  # noqa: F811 - the fixture
    load: Load,
    tiny_llama: Path,
    tmp_path: Path,
    dtype: str,
) -> None:
    folder = export(tiny_llama, tmp_path / "folder", dtype=dtype)
    path = export(tiny_llama, tmp_path / "tiny.gguf", format="gguf", dtype=dtype)
    assert load(path).dtype == load(folder).dtype
    assert stored_gguf_dtype(GgufFile(path)) == stored_dtype(Checkpoint(folder), read_config(Checkpoint(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-2", "gemma-3"])
def test_a_file_loads_in_about_the_time_of_its_folder(
    export: Export,  # noqa: F811 - the fixture
    load: Load,
    tmp_path: Path,
    name: str,
) -> None:
    """A file took twenty times as long, nearly all of it to build the tokenizer."""
    folder = write_model(tmp_path / "folder", name)
    path = export(folder, tmp_path / "model.gguf", format="gguf")
    seconds: dict[Path, list[float]] = {folder: [], path: []}
    for _ in range(10):
        for model, times in seconds.items():
            started = time.process_time()
            load(model)
            times.append(time.process_time() - started)
    assert min(seconds[path]) < 2 * min(seconds[folder])
