"""How `--help` looks: plain text that reads well at 80 columns, options and commands under headings.

Descriptions stand below their options, so that no name is cut and every line is wide enough to read.
"""

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

_INDENT = 8
"""Columns before a description: less than names take, so that it begins on a line of its own."""

_ARGUMENTS, _OPTIONS, _COMMANDS = "Arguments", "Options", "Commands"
_WHOLE_SENTENCE = 1000

# What typer 0.29 shows, by what the settings' own options show.
_TYPES = {"int": "INTEGER", "float": "NUMBER", "str": "TEXT", "path": "PATH", "bool": ""}

# typer brings a click of its own in some versions and uses the installed one in others: neither's types hold for all.
_Click = Any


class HelpCommand(TyperCommand):
    """A command whose options stand under the headings that their `rich_help_panel` names."""

    def format_options(self, ctx: _Click, formatter: _Click) -> None:
        """Write the arguments, then the options by heading, those without one last."""
        panels: dict[str, list[tuple[str, str]]] = {_ARGUMENTS: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                names, description = record
                shown = names.split()[0] if param.param_type_name == "argument" else _with_plain_types(names)
                panels.setdefault(_panel(param), []).append((shown, description))
        panels[_OPTIONS] = panels.pop(_OPTIONS, [])
        for heading, records in panels.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records, col_max=_INDENT)


class HelpGroup(TyperGroup):
    """A group whose commands stand under the headings that their `rich_help_panel` names."""

    def format_commands(self, ctx: _Click, formatter: _Click) -> None:
        """Write the commands by heading, in the order in which they were added."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if not command.hidden:
                heading = getattr(command, "rich_help_panel", None)
                records = panels.setdefault(heading if isinstance(heading, str) else _COMMANDS, [])
                records.append((name, command.get_short_help_str(_WHOLE_SENTENCE)))
        for heading, records in panels.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _panel(param: _Click) -> str:
    if param.param_type_name == "argument":
        return _ARGUMENTS
    panel = getattr(param, "rich_help_panel", None)
    return panel if isinstance(panel, str) else _OPTIONS


def _with_plain_types(names: str) -> str:
    def plain(found: re.Match[str]) -> str:
        name = found[1].removeprefix("list[").removesuffix("]").removesuffix(" range")
        return _TYPES.get(name, name)

    return re.sub(r"<([^>]*)>", plain, names).rstrip()
