"""Command-line options made from a settings class, so that flag, environment variable and field cannot drift apart.

A command is a function `run(settings, ...)`. `settings_command` gives typer a function whose options are the settings'
fields, followed by whatever further parameters `run` declares.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError
from typer.models import ArgumentInfo, OptionInfo

from cllm_core.cli.command import describe_command, exit_with
from cllm_core.errors import ConfigError

from ..engine_settings import ENV_PREFIX, EngineSettings, Panel

Settings = TypeVar("Settings", bound=EngineSettings)

_POSITIONAL = "model"


def settings_command(run: Callable[..., None], settings_type: type[EngineSettings]) -> Callable[..., None]:
    """A function for `typer.Typer.command`: it builds the settings from its options and calls `run` with them."""
    own = list(inspect.signature(run).parameters.values())[1:]

    def command(**given: object) -> None:
        rest = {parameter.name: given.pop(parameter.name) for parameter in own}
        run(load_settings(settings_type, given), **rest)

    parameters = [_parameter(name, info) for name, info in settings_type.model_fields.items()]
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


def load_settings(settings_type: type[Settings], given: dict[str, object]) -> Settings:
    """Settings from the options given and, for the rest, the environment; bad ones end the program with one line."""
    try:
        return settings_type(**{name: value for name, value in given.items() if value not in (None, [])})  # type: ignore[arg-type]
    except ValidationError as error:
        exit_with(_describe(error.errors()[0], settings_type))
    except SettingsError as error:
        exit_with(str(error))


def flag_of(name: str, info: FieldInfo) -> str:
    """The flag of a settings field; one that may be given again is named in the singular."""
    plural = "es" if name.endswith("ses") else "s"
    stem = name.removesuffix(plural) if _is_list(info) else name
    return "--" + stem.replace("_", "-")


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    annotation: object = Annotated[_cli_type(info), _typer_info(name, info)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typer_info(name: str, info: FieldInfo) -> ArgumentInfo | OptionInfo:
    envvar = f"{ENV_PREFIX}{name}".upper()
    default = _shown_default(info)
    if name == _POSITIONAL:
        argument: ArgumentInfo = typer.Argument(
            help=info.description, envvar=envvar, metavar="MODEL", show_default=default
        )
        return argument
    flag = flag_of(name, info)
    names = [f"{flag}/--no-{flag.removeprefix('--')}"] if info.annotation is bool else [flag]
    option: OptionInfo = typer.Option(
        *names,
        help=info.description,
        envvar=envvar,
        metavar=_metavar(info),
        show_default=default,
        rich_help_panel=_panel(info),
    )
    return option


def _cli_type(info: FieldInfo) -> object:
    """Options arrive as text: pydantic alone decides what is valid, whichever way a value comes in."""
    if info.annotation is bool:
        return bool | None
    return list[str] | None if _is_list(info) else str | None


def _is_list(info: FieldInfo) -> bool:
    return typing.get_origin(info.annotation) is tuple


def _panel(info: FieldInfo) -> str:
    return next(item.name for item in info.metadata if isinstance(item, Panel))


def _metavar(info: FieldInfo) -> str | None:
    if info.annotation is bool:
        return None
    kinds = [kind for kind in _union_members(info.annotation) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is Literal:
        return "|".join(typing.get_args(kinds[0]))
    return {int: "INTEGER", float: "NUMBER"}.get(typing.cast(type, kinds[0]), "TEXT")


def _union_members(annotation: object) -> tuple[object, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _shown_default(info: FieldInfo) -> str | bool:
    if info.annotation is bool:
        return "on" if info.default else "off"
    return str(info.default) if info.default not in (None, ()) else False


def _describe(error: ErrorDetails, settings_type: type[EngineSettings]) -> str:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    name = str(error["loc"][0])
    info = settings_type.model_fields.get(name)
    if info is None:
        return f"{name}: {error['msg']}"
    return f"{flag_of(name, info)} ({ENV_PREFIX}{name.upper()}) = {error['input']!r}: {error['msg']}"
