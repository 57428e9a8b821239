"""What is kept of every answer, and the files that make an interrupted run go on where it stopped."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cllm_core.errors import ConfigError, DataError
from cllm_core.request import FinishReason
from cllm_core.tasks.records import decode_lines

RUN_FILE = "run.json"
ANSWERS_FILE = "answers.jsonl"

_MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.gguf", "*.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "cllm.json", "*.py"),
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    "chat_template*",
)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of one model at one block length.

    Attributes:
        model: role of the model that answered ("target" or "model").
        block_length: n in tokens, 1 is AR.
        example: id of the example.
        text: without the stop token.
        token_ids: with it.
        num_passes: forward passes that yielded tokens.
        num_prefill_passes, num_prefill_tokens: those that computed prompt tokens too, and what they yielded.
        num_fast_forwarded, num_stationary: tokens; see `trajectory`.
        repetition: rep-4, 0..1.
        scores: measures of the task, 0..1.
        seconds: wall-clock time of each repeat; empty where times were not measured.
        first_seconds: of each repeat, until the first tokens.
    """

    model: str
    block_length: int
    example: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_passes: int
    num_prefill_passes: int
    num_prefill_tokens: int
    num_fast_forwarded: int
    num_stationary: int
    repetition: float
    scores: dict[str, float]
    seconds: tuple[float, ...] = ()
    first_seconds: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        """(model, block length, example): one answer of each is kept."""
        return self.model, self.block_length, self.example

    @property
    def num_tokens(self) -> int:
        """Length of the answer."""
        return len(self.token_ids)


class AnswerStore:
    """Answers in a folder, appended one line each. A line cut short by an interruption is dropped on opening.

    Args:
        folder: made where it does not exist.
        settings: what decides the answers; a folder written with others is refused.

    Raises:
        ConfigError: the folder holds a run with other settings, or cannot be written.
        DataError: a line that is not the last is broken.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder = folder
        self._path = folder / ANSWERS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_settings(msgspec.json.decode(msgspec.json.encode(settings), type=dict[str, object]))
            self._drop_torn_line()
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be written ({error}); name another folder") from error
        self.answers = {answer.key: answer for answer in self._read()}

    def add(self, answer: Answer) -> None:
        """Keep an answer, on the disk too."""
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(answer) + b"\n")
        self.answers[answer.key] = answer

    def _check_settings(self, settings: Mapping[str, object]) -> None:
        path = self.folder / RUN_FILE
        if not path.exists():
            path.write_bytes(msgspec.json.format(msgspec.json.encode(settings)) + b"\n")
            return
        try:
            before = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: {error}; give --output another folder") from error
        changed = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
        if changed:
            name = min(changed)
            raise ConfigError(
                f"--output {self.folder}: holds a run with {name}={before.get(name)!r}, this one has "
                f"{name}={settings.get(name)!r}; name another folder, or repeat that run to go on with it"
            )

    def _drop_torn_line(self) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        if data and not data.endswith(b"\n"):
            self._path.write_bytes(data[: data.rfind(b"\n") + 1])

    def _read(self) -> list[Answer]:
        if not self._path.exists():
            return []
        return [answer for _, answer in decode_lines(self._path.read_bytes(), Answer, self._path)]


def fingerprint(path: Path) -> str:
    """Digest of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return _short_digest(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); name a readable file") from error


def fingerprint_model(path: Path) -> str:
    """Digest of the names, sizes and times of what a model is read from: a file, or those of a folder.

    Model cards, results and the checkpoints of a training may lie there too, and change nothing.

    Raises:
        DataError: it cannot be read.
    """
    try:
        entries = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in entries if any(file.match(pattern) for pattern in _MODEL_FILES)]
        stats = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); name a readable model") from error
    return _short_digest("\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats).encode())


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
