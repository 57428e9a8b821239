"""Command-line options made from a settings class, so that flag, environment variable and field cannot drift apart.

A command is a function `run(settings, ...)`. `settings_command` gives typer a function whose options are the settings'
fields, followed by whatever further parameters `run` declares.
"""

import inspect
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError
from typer.models import ArgumentInfo, OptionInfo

from cllm_core.cli.command import describe_command, exit_with
from cllm_core.errors import ConfigError

from ..engine_settings import EngineSettings, Panel
from .config_file import read_config_file
from .names import CONFIG_VARIABLE, flag_of, is_list, require_known_variables, variables_of

Settings = TypeVar("Settings", bound=EngineSettings)

_POSITIONAL = "model"
_CONFIG = "config"
_LONGEST_CHOICES = 50  # characters

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        f"--{_CONFIG}",
        help="TOML file with settings by the names of these options; options and environment go before it.",
        envvar=CONFIG_VARIABLE,
        metavar="FILE",
        show_default=False,
    ),
]


def settings_command(run: Callable[..., None], settings_type: type[EngineSettings]) -> Callable[..., None]:
    """A function for `typer.Typer.command`: it builds the settings from its options and calls `run` with them."""
    own = list(inspect.signature(run).parameters.values())[1:]

    def command(**given: object) -> None:
        rest = {parameter.name: given.pop(parameter.name) for parameter in own}
        file = typing.cast(Path | None, given.pop(_CONFIG))
        run(load_settings(settings_type, given, file), **rest)

    parameters = [_parameter(name, info) for name, info in settings_type.model_fields.items()]
    parameters.append(inspect.Parameter(_CONFIG, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile))
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    return describe_command(command, like=run, parameters=parameters)


def single_model_command(run: Callable[..., None]) -> Callable[..., None]:
    """The same for a command of the library that runs one model: `run` gets its EngineConfig."""

    def run_with(settings: EngineSettings, **rest: object) -> None:
        try:
            config = settings.to_single_model_config()
        except ConfigError as error:
            exit_with(str(error))
        run(config, **rest)

    parameters = list(inspect.signature(run).parameters.values())
    return settings_command(describe_command(run_with, like=run, parameters=parameters), EngineSettings)


def load_settings(settings_type: type[Settings], given: dict[str, object], file: Path | None = None) -> Settings:
    """Settings from the options given; those left out from the environment, then from the file, if there is one.

    Bad ones end the program with one line.
    """
    try:
        require_known_variables(os.environ)
        values = {} if file is None else _of_command(read_config_file(file), settings_type)
        values |= {name: value for name, value in _from_environment(settings_type).items() if value}
        values |= {name: value for name, value in given.items() if value not in (None, [])}
        return settings_type(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        exit_with(_describe(error.errors()[0], settings_type))
    except (ConfigError, SettingsError) as error:
        exit_with(str(error))


def _of_command(values: dict[str, object], settings_type: type[EngineSettings]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name in settings_type.model_fields}


def _from_environment(settings_type: type[EngineSettings]) -> dict[str, str]:
    """Values of the variables that are set, as text."""
    return {
        name: os.environ[variable]
        for name in settings_type.model_fields
        for variable in variables_of(name)
        if variable in os.environ
    }


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    annotation: object = Annotated[_cli_type(info), _typer_info(name, info)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typer_info(name: str, info: FieldInfo) -> ArgumentInfo | OptionInfo:
    envvar = variables_of(name)[0]
    if name == _POSITIONAL:
        argument: ArgumentInfo = typer.Argument(
            help=_help(name, info), envvar=envvar, show_envvar=False, metavar="MODEL", show_default=False
        )
        return argument
    flag = flag_of(name, info)
    names = [f"{flag}/--no-{flag.removeprefix('--')}"] if info.annotation is bool else [flag]
    option: OptionInfo = typer.Option(
        *names,
        help=_help(name, info),
        envvar=envvar,
        show_envvar=False,
        metavar=_metavar(info),
        show_default=False,
        rich_help_panel=_panel(info),
    )
    return option


def _help(name: str, info: FieldInfo) -> str:
    """The description, choices that are too many for the option's own line, default and variable."""
    choices = _choices(info)
    many = [f" One of {', '.join(choices)}."] if len("|".join(choices)) > _LONGEST_CHOICES else []
    facts = [f"default: {default}"] if (default := _shown_default(info)) else []
    return f"{info.description}{''.join(many)} [{', '.join([*facts, variables_of(name)[0]])}]"


def _cli_type(info: FieldInfo) -> object:
    """Options arrive as text: pydantic alone decides what is valid, whichever way a value comes in."""
    if info.annotation is bool:
        return bool | None
    return list[str] | None if is_list(info) else str | None


def _panel(info: FieldInfo) -> str:
    return next(item.name for item in info.metadata if isinstance(item, Panel))


def _metavar(info: FieldInfo) -> str | None:
    if info.annotation is bool:
        return None
    if choices := "|".join(_choices(info)):
        return choices if len(choices) <= _LONGEST_CHOICES else "NAME"
    return {int: "INTEGER", float: "NUMBER"}.get(typing.cast(type, _kind(info)), "TEXT")


def _choices(info: FieldInfo) -> tuple[str, ...]:
    """Of a setting that must be one of some words; empty for others."""
    kind = _kind(info)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _kind(info: FieldInfo) -> object:
    return next(kind for kind in _union_members(info.annotation) if kind is not type(None))


def _union_members(annotation: object) -> tuple[object, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _shown_default(info: FieldInfo) -> str:
    """Empty where there is none to show."""
    if info.annotation is bool:
        return "on" if info.default else "off"
    if isinstance(info.default, tuple):
        return ", ".join(info.default)
    return "" if info.default is None else str(info.default)


def _describe(error: ErrorDetails, settings_type: type[EngineSettings]) -> str:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    name = str(error["loc"][0])
    info = settings_type.model_fields.get(name)
    if info is None:
        return f"{name}: {error['msg']}"
    return f"{flag_of(name, info)} ({variables_of(name)[0]}) = {error['input']!r}: {error['msg']}"
