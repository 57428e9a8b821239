"""What every console command needs: its signature for typer, and one line on stderr where it cannot go on."""

import inspect
import typing
from collections.abc import Callable

import typer

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


def describe_command(
    command: Callable[..., None], *, like: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """Give `command` these parameters and the name and help of `like`, which is where typer looks for them."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__ = like.__name__
    command.__doc__ = like.__doc__
    return command


def exit_with(message: str) -> typing.NoReturn:
    """End the program as typer ends it on wrong usage: one clear line on stderr, exit code 2."""
    typer.secho(f"error: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(USAGE_EXIT_CODE)
