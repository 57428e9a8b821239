"""llama.cpp computes what we compute from the same file, and what transformers computes from the model's folder.

Needs llama.cpp's server, whose path is in the environment variable LLAMA_SERVER; any build of 2025 or later will do.
"""

import json
import os
import socket
import subprocess
import time
import unicodedata
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import VOCAB_SIZE, write_gguf
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import CONFIGS, write_model
from tests.models.conftest import Load
from tests.models.gguf.test_round_trip import MAX_DIFFERENCE, log_probabilities, random_tokens
from tests.models.gguf.test_tokenizer import (
    corpus,
    export_byte_level,
    read,
    train_byte_level,
    train_sentencepiece,
    write_sentencepiece,
)

SERVER = os.environ.get("LLAMA_SERVER")
LENGTHS_BY_CONTEXT = {256: (5, 33, 90), 512: (5, 300)}
"""The context chooses the factors of a longrope, there and here."""

MAX_GELU_DIFFERENCE = 0.02  # nats; llama.cpp looks the GELU up in a table of float16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER is None, reason="LLAMA_SERVER does not name llama.cpp's server"),
]


@contextmanager
def llama_server(path: Path, context: int) -> Iterator[str]:
    """llama.cpp with the file, computing in float32 throughout. Yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(SERVER), "--model", str(path), "--port", str(port), "--ctx-size", str(context), "--parallel", "1"]
    words += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--no-warmup", "--threads", "1"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(str(SERVER)).parent)}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield wait_until_ready(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(address: str, process: subprocess.Popen[str]) -> str:
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1][-2000:])
        try:
            urllib.request.urlopen(f"{address}/health").close()
        except OSError:
            time.sleep(0.1)
        else:
            return address
    raise AssertionError("llama-server did not start")


def ask(address: str, path: str, body: dict[str, object]) -> dict[str, Any]:
    """What the server answers."""
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def next_token(address: str, ids: list[int]) -> torch.Tensor:
    """[V], log-probabilities of the token behind these.

    They come with the token that is sampled, unless that is an end or half a character, so it is made to be a letter;
    the log-probabilities are those before that.
    """
    body = {"prompt": ids, "n_predict": 1, "n_probs": VOCAB_SIZE, "cache_prompt": False, "logit_bias": [["a", 1000]]}
    (position,) = ask(address, "completion", body)["completion_probabilities"]
    values = torch.full((VOCAB_SIZE,), torch.nan)
    for entry in position["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values


@pytest.mark.parametrize("context", LENGTHS_BY_CONTEXT)
@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name != "phi-3-windowed"]
)  # llama.cpp leaves the window out
def test_llama_cpp_computes_the_same_from_the_file(
    export: Export,  # noqa: F811 - the fixture
    load: Load,
    tmp_path: Path,
    name: str,
    context: int,
) -> None:
    folder = write_model(tmp_path / "folder", name)
    path = export(folder, tmp_path / "model.gguf", format="gguf")
    limit = MAX_GELU_DIFFERENCE if name.startswith(("gemma", "starcoder")) else MAX_DIFFERENCE
    models = load(folder, max_model_len=context).model, load(path, max_model_len=context).model
    with llama_server(path, context) as address:
        for length in LENGTHS_BY_CONTEXT[context]:
            theirs = next_token(address, random_tokens(length)[0].tolist())
            for model in models:
                difference = (log_probabilities(model, length)[0, -1] - theirs).abs().max()
                assert difference < limit, (length, float(difference))


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
