"""The console command `cllm`. A command imports what it needs when it runs, so that `--help` is instant."""

from typing import Annotated

import msgspec
import typer

import cllm_core.bench.cli as bench_cli
import cllm_core.check.cli as check_cli
import cllm_core.evaluation.cli as evaluation_cli
import cllm_core.export.cli as export_cli
import cllm_core.training.cli as training_cli
from cllm_core.cli.command import exit_with
from cllm_core.cli.struct_options import struct_command, with_struct_options
from cllm_core.errors import ConfigError
from cllm_core.logs import LogFormat, LogLevel
from cllm_core.training.config import SftConfig, TrainConfig, TrajectoryConfig

from ..cluster.settings import ClusterSettings
from ..engine_settings import EngineSettings
from ..settings import ServerSettings
from . import local
from .options import settings_command, single_model_command

app = typer.Typer(
    name="cllm",
    help="Serve Consistency LLMs through OpenAI's API, with batched Jacobi decoding.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()


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


app.command()(settings_command(serve, ServerSettings))
app.command()(settings_command(deploy, ClusterSettings))
app.command()(settings_command(worker, EngineSettings))
app.command()(settings_command(local.generate, EngineSettings))
app.command()(settings_command(local.chat, EngineSettings))
app.command("eval")(single_model_command(with_struct_options(evaluation_cli.evaluate, evaluation_cli.EvalOptions)))
app.command()(struct_command(training_cli.sft, SftConfig))
app.command()(struct_command(training_cli.trajectories, TrajectoryConfig))
app.command()(struct_command(training_cli.train, TrainConfig))

app.command()(single_model_command(check_cli.check))

bench = typer.Typer(name="bench", help="Measure speed on this machine.", no_args_is_help=True)
bench.command("engine")(single_model_command(bench_cli.engine))
app.add_typer(bench)
app.command()(training_cli.card)
app.command()(export_cli.export)
