"""The console command `cllm`. A command imports what it needs when it runs, so that `--help` is instant."""

from collections.abc import Callable
from typing import Annotated

import msgspec
import typer

import cllm_core.bench.cli as bench_cli
import cllm_core.check.cli as check_cli
import cllm_core.evaluation.cli as evaluation_cli
import cllm_core.export.cli as export_cli
import cllm_core.training.cli as training_cli
from cllm_core import __version__
from cllm_core.cli.command import exit_with
from cllm_core.cli.help import HelpCommand, HelpGroup
from cllm_core.cli.struct_options import struct_command, with_struct_options
from cllm_core.errors import ConfigError
from cllm_core.logs import LogFormat, LogLevel
from cllm_core.training.config import SftConfig, TrainConfig, TrajectoryConfig

from ..cluster.settings import ClusterSettings
from ..engine_settings import EngineSettings
from ..settings import ServerSettings
from . import local, models
from .options import settings_command, single_model_command

app = typer.Typer(
    name="cllm",
    help="Serve Consistency LLMs through OpenAI's API, with batched Jacobi decoding.",
    cls=HelpGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"cllm-server {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def serve(settings: ServerSettings) -> None:
    """Serve a model through OpenAI's API until Ctrl-C or SIGTERM."""
    from .serve import serve as run_server  # noqa: PLC0415

    try:
        run_server(settings)
    except ConfigError as error:
        exit_with(str(error))


def worker(
    settings: EngineSettings,
    *,
    endpoint: Annotated[
        str,
        typer.Option(
            help="Where to listen: tcp://ADDRESS:PORT or ipc://PATH. There is no authentication: whoever reaches it "
            "can use and stop the worker, so stay on loopback or a private network."
        ),
    ],
    log_level: Annotated[LogLevel, typer.Option(help="Least severity of what is logged.")] = "info",
    log_format: Annotated[LogFormat, typer.Option(help="auto: console on a terminal, else JSON lines.")] = "auto",
) -> None:
    """Run a worker alone, for `cllm serve --worker ENDPOINT`."""
    from cllm_core.worker.process import main as run_worker  # noqa: PLC0415

    config = msgspec.json.encode(settings.to_engine_config()).decode()
    options = ["--endpoint", endpoint, "--config", config, "--log-level", log_level, "--log-format", log_format]
    raise typer.Exit(run_worker(options))


def deploy(settings: ClusterSettings) -> None:
    """Serve a model on a Ray cluster: several replicas, more of them under load. Needs the extra `ray`."""
    try:
        from ..cluster.command import deploy as run_deploy  # noqa: PLC0415
    except ModuleNotFoundError as error:
        exit_with(f"{error}; install Ray: pip install 'cllm-server[ray]'")
    try:
        run_deploy(settings)
    except (ConfigError, ConnectionError) as error:
        exit_with(str(error))


def _add(group: typer.Typer, heading: str, command: Callable[..., None], name: str | None = None) -> None:
    group.command(name, cls=HelpCommand, rich_help_panel=heading)(command)


_add(app, "Serve", settings_command(serve, ServerSettings))
_add(app, "Serve", settings_command(deploy, ClusterSettings))
_add(app, "Serve", settings_command(worker, EngineSettings))
_add(app, "Use a model in the terminal", settings_command(local.generate, EngineSettings))
_add(app, "Use a model in the terminal", settings_command(local.chat, EngineSettings))
_add(app, "Models", models.models)
_add(app, "Models", models.pull)
_add(app, "Models", single_model_command(models.info))
_add(app, "Models", single_model_command(check_cli.check))
_add(app, "Models", export_cli.export)
_add(app, "Train a Consistency LLM", struct_command(training_cli.sft, SftConfig))
_add(app, "Train a Consistency LLM", struct_command(training_cli.trajectories, TrajectoryConfig))
_add(app, "Train a Consistency LLM", struct_command(training_cli.train, TrainConfig))
_add(app, "Train a Consistency LLM", training_cli.card)
_add(
    app,
    "Measure",
    single_model_command(with_struct_options(evaluation_cli.evaluate, evaluation_cli.EvalOptions)),
    "eval",
)

bench = typer.Typer(name="bench", cls=HelpGroup, help="Measure speed on this machine.", no_args_is_help=True)
_add(bench, "Commands", single_model_command(bench_cli.engine), "engine")
app.add_typer(bench, rich_help_panel="Measure")
