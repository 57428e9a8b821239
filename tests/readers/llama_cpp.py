"""llama.cpp's programs: what its server computes from a file, and the files that its converter writes.

LLAMA_SERVER in the environment is the path of its server, LLAMA_CONVERTER that of its convert_hf_to_gguf.py; any
release of 2026 will do.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from cllm_core.models.gguf.file import GgufFile
from cllm_core.models.gguf.tokenizer import read_gguf_tokenizer
from tests.checkpoints import VOCAB_SIZE, write_checkpoint, write_gguf
from tests.gguf_models import log_probabilities, random_tokens, write_model
from tests.models.conftest import load_silently
from tests.models.gguf.test_tokenizer import train_sentencepiece, write_sentencepiece

SERVER: Final = os.environ.get("LLAMA_SERVER") or None
CONVERTER: Final = os.environ.get("LLAMA_CONVERTER") or None

LENGTHS_BY_CONTEXT: Final[Mapping[int, tuple[int, ...]]] = {256: (5, 33, 90), 512: (5, 300)}
"""Tokens of the texts that are compared. The context chooses the factors of a longrope, there and here."""

_SCRIPT: Final = Path(__file__).with_name("convert_with_llama_cpp.py")
_WITH_SENTENCEPIECE: Final = ("llama-2", "mistral", "gemma", "phi")  # as the published models of the family
_WITHOUT_PREFIX: Final = "gemma"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest differences of log-probabilities, in nats.

    Attributes:
        to_folder: of what we compute from the file, from what we compute from the model's folder, at every position.
        to_llama_cpp: of both of these from what llama.cpp computes from the file, behind each text.
    """

    to_folder: float
    to_llama_cpp: float


def compare(folder: Path, file: Path) -> Comparison:
    """Compare a model's folder with a GGUF file of it, in float32 and for every context of LENGTHS_BY_CONTEXT."""
    found = [_compare_texts(folder, file, context) for context in LENGTHS_BY_CONTEXT]
    return Comparison(max(one.to_folder for one in found), max(one.to_llama_cpp for one in found))


def _compare_texts(folder: Path, file: Path, context: int) -> Comparison:
    expected, loaded = (load_silently(path, dtype="float32", max_model_len=context).model for path in (folder, file))
    to_folder = to_llama_cpp = 0.0
    with llama_server(file, context) as address:
        for length in LENGTHS_BY_CONTEXT[context]:
            ours = log_probabilities(expected, length)[0], log_probabilities(loaded, length)[0]
            theirs = _next_token(address, random_tokens(length)[0].tolist())
            to_folder = max(to_folder, _distance(*ours))
            to_llama_cpp = max(to_llama_cpp, *(_distance(logprobs[-1], theirs) for logprobs in ours))
    return Comparison(to_folder, to_llama_cpp)


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    difference = (first - second).abs().max()
    assert difference.isfinite()
    return float(difference)


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
        yield _wait_until_ready(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.communicate()


def _wait_until_ready(address: str, process: subprocess.Popen[str]) -> str:
    for _ in range(600):
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read()[-2000:])
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


def _next_token(address: str, ids: list[int]) -> torch.Tensor:
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


def convert(files: Mapping[Path, Path]) -> None:
    """Convert folders to files by llama.cpp's converter."""
    tasks = [f"{folder}={file}" for folder, file in files.items()]
    words = [sys.executable, str(_SCRIPT), str(CONVERTER), *tasks]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def write_for_converter(folder: Path, name: str) -> Path:
    """The model of tests.gguf_models.CONFIGS, with a tokenizer of the kind that its family has. Returns the folder."""
    write_model(folder, name)
    if name.startswith(_WITH_SENTENCEPIECE):
        tokenizer, model = _sentencepiece(prefix=not name.startswith(_WITHOUT_PREFIX))
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(model)
    return folder


@functools.cache
def _sentencepiece(*, prefix: bool) -> tuple[PreTrainedTokenizerBase, bytes]:
    """A SentencePiece tokenizer for transformers, and its tokenizer.model."""
    model = train_sentencepiece([], prefix=prefix)
    with tempfile.TemporaryDirectory() as scratch:
        base = write_gguf(Path(scratch) / "base.gguf", write_checkpoint(Path(scratch) / "base", "llama"))
        file = GgufFile(write_sentencepiece(Path(scratch) / "spm.gguf", base, model, [], prefix=prefix))
        return read_gguf_tokenizer(file), model.serialized_model_proto()
