"""Conversations to train on, out of the files and data sets that users have. No torch in here."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from cllm_core.errors import ConfigError, DataError
from cllm_core.tasks.records import read_numbered_lines
from cllm_core.tasks.renaming import rename_examples
from cllm_core.tasks.spider import format_answer, format_prompt, load_examples, load_schemas
from cllm_core.training.config import DataConfig

_MESSAGES = "messages"


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True):
    """What the model is shown, and the answer where one is known.

    Attributes:
        messages: at least one; the last is not the assistant's.
        answer: what the assistant says next, None where the data does not tell.
    """

    messages: tuple[Message, ...]
    answer: str | None = None

    @property
    def prompt_fingerprint(self) -> str:
        """Changes with the messages; a chat template that writes today's date does not change it."""
        return hashlib.sha256(msgspec.json.encode(self.messages)).hexdigest()[:16]


def load_conversations(config: DataConfig, *, seed: int = 0) -> list[Conversation]:
    """Read the conversations that `config` names, at least one.

    Args:
        config: its `data` is set.
        seed: of random renamings.

    Raises:
        DataError: a file is missing or broken, or a record lacks what is asked of it.
        ConfigError: a package that is needed is not installed.
    """
    assert config.data is not None
    path = Path(config.data).expanduser()
    if config.tables is not None:
        found = _from_spider(path, config.tables, renamings=config.renamings, seed=seed)
    elif path.exists() or path.suffix in {".jsonl", ".json", ".gz"}:
        found = [
            _from_record(record, config, f"{path}, line {line}") for line, record in read_numbered_lines(path, dict)
        ]
    else:
        found = _from_hub(config)
    if not found:
        raise DataError(f"{config.data}: holds no conversation; give data with at least one")
    return found[: config.limit]


def require_answers(conversations: Iterable[Conversation], config: DataConfig) -> None:
    """Raise DataError unless every conversation has an answer to learn."""
    for number, conversation in enumerate(conversations, start=1):
        if not conversation.answer:
            raise DataError(
                f"{config.data}: record {number} has no answer in {config.answer_column!r} (and no assistant's message "
                "at its end); name the column with answer_column, or record answers with `cllm trajectories`"
            )


def _from_spider(path: Path, tables: Path, *, renamings: int, seed: int) -> list[Conversation]:
    schemas = load_schemas(tables)
    pairs = [(schemas[example.db_id], example) for example in load_examples(path, schemas)]
    pairs += rename_examples(pairs, copies=renamings, seed=seed)
    return [
        Conversation((Message("user", format_prompt(schema, example.question)),), format_answer(example.query))
        for schema, example in pairs
    ]


def _from_hub(config: DataConfig) -> list[Conversation]:
    try:
        import datasets  # noqa: PLC0415 - heavy, and needed for data sets from the Hub alone
    except ImportError as error:
        raise ConfigError(
            f"data={config.data}: no such file, and data sets from the Hub need the package datasets; "
            "run `pip install 'cllm-server[train]'`, or name an existing file"
        ) from error
    try:
        rows = datasets.load_dataset(config.data, split=config.split)
    except Exception as error:  # foreign code: network, files and parsing fail in many ways, and the cause is kept
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{config.data}: neither a file nor a data set that can be had (split {config.split!r}): {detail}"
        ) from error
    return [_from_record(row, config, f"{config.data}, row {number}") for number, row in enumerate(rows)]


def _from_record(record: object, config: DataConfig, where: str) -> Conversation:
    if not isinstance(record, Mapping):
        raise DataError(f'{where}: not an object; each line is like {{"prompt": ...}}')
    column = config.prompt_column if config.prompt_column in record else _MESSAGES
    if column not in record:
        raise DataError(
            f"{where}: has neither {config.prompt_column!r} nor {_MESSAGES!r} but {', '.join(map(str, record))}; "
            "name the column with prompt_column"
        )
    prompt = record[column]
    answer = record.get(config.answer_column)
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{where}: {config.answer_column!r} is no text")
    if isinstance(prompt, str):
        messages: tuple[Message, ...] = (Message("user", prompt),)
    else:
        messages = _as_messages(prompt, f"{where}: {column!r}")
    if messages[-1].role == "assistant":
        messages, answer = messages[:-1], messages[-1].content
    if not messages or not messages[-1].content.strip():
        raise DataError(f"{where}: the prompt is empty")
    return Conversation(messages, answer)


def _as_messages(value: object, where: str) -> tuple[Message, ...]:
    try:
        messages = msgspec.convert(value, tuple[Message, ...])
    except msgspec.ValidationError as error:
        raise DataError(f'{where}: {error}; give a text or a list of {{"role", "content"}}') from error
    if not messages:
        raise DataError(f"{where}: is an empty list; give at least the user's message")
    return messages
