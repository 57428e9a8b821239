"""Command-line options made from a settings struct: flag, default and help come from its fields.

A field that is a struct itself becomes a panel of options; `model` is the command's argument. For the commands whose
settings are msgspec structs: those of `cllm_core.training.config`, and `cllm eval`.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
import typer
from typer.models import ArgumentInfo, OptionInfo

from cllm_core.cli.command import describe_command, exit_with
from cllm_core.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)
Settings = TypeVar("Settings")

_POSITIONAL = "model"


def struct_command(run: Callable[[Config], None], config_type: type[Config]) -> Callable[..., None]:
    """A function for `typer.Typer.command`: it builds the settings from its options and calls `run` with them."""

    def command(**given: object) -> None:
        run(_build(config_type, given))

    return describe_command(command, like=run, parameters=_parameters(config_type, panel=None))


def with_struct_options(run: Callable[[Settings, Config], None], config_type: type[Config]) -> Callable[..., None]:
    """The same for a command that takes other settings, too: a function of both, for `settings_command`."""

    def command(settings: Settings, **given: object) -> None:
        run(settings, _build(config_type, given))

    own = inspect.Parameter("settings", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return describe_command(command, like=run, parameters=[own, *_parameters(config_type, panel=None)])


def _build(config_type: type[Config], given: dict[str, object]) -> Config:
    """The settings; a wrong value ends the program with one line."""
    try:
        return config_type(**_values(config_type, given))
    except ConfigError as error:
        exit_with(str(error))


def _values(config_type: type[msgspec.Struct], given: dict[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(config_type):
        kind = _kind(field.type)
        if issubclass(kind, msgspec.Struct):
            values[field.name] = kind(**_values(kind, given))
        elif given[field.name] is not None:
            values[field.name] = given[field.name]
    return values


def _parameters(config_type: type[msgspec.Struct], panel: str | None) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(config_type, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for field in msgspec.structs.fields(config_type):
        kind = _kind(field.type)
        if issubclass(kind, msgspec.Struct):
            parameters += _parameters(kind, panel=field.name.capitalize())
        else:
            parameters.append(_parameter(field, hints[field.name], panel))
    return parameters


def _parameter(field: msgspec.structs.FieldInfo, hint: object, panel: str | None) -> inspect.Parameter:
    description = next(meta.description for meta in typing.get_args(hint)[1:] if isinstance(meta, msgspec.Meta))
    default = inspect.Parameter.empty if field.required else field.default
    info: ArgumentInfo | OptionInfo
    if field.name == _POSITIONAL:
        info = typer.Argument(help=description, metavar="MODEL", show_default=False)
    else:
        flag = "--" + field.name.replace("_", "-")
        names = [f"{flag}/--no-{flag.removeprefix('--')}"] if _kind(field.type) is bool else [flag]
        info = typer.Option(*names, help=description, rich_help_panel=panel, show_default=field.default is not None)
    annotation: object = Annotated[field.type, info]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(annotation: object) -> type:
    """The class behind an annotation: of a union the first member that is not None, of a literal that of its values."""
    if typing.get_origin(annotation) is Annotated:
        return _kind(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(_kind(member) for member in typing.get_args(annotation) if member is not type(None))
    if typing.get_origin(annotation) is Literal:
        return str
    assert isinstance(annotation, type)
    return annotation
