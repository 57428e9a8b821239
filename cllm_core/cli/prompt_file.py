"""Files of prompts, as the commands take them."""

import sys
from pathlib import Path

import msgspec

from cllm_core.cli.command import exit_with
from cllm_core.errors import DataError
from cllm_core.tasks.records import decode_lines, read_json_lines


def read_prompt_file(file: Path, *, option: str) -> list[str]:
    """The prompts of a file of JSON lines, "-" for standard input; ends the command where it is no such file."""
    try:
        if str(file) != "-":
            return [line.prompt for line in read_json_lines(file, _PromptLine)]
        lines = list(decode_lines(sys.stdin.buffer.read(), _PromptLine, Path("standard input")))
    except DataError as error:
        exit_with(f"{option} {error}")
    return [line.prompt for _, line in lines] or exit_with(f"{option} -: standard input holds no prompt")


class _PromptLine(msgspec.Struct):
    prompt: str
