"""`cllm export`: a model for other programs, adapter merged.

torch is imported when the command runs, so that `cllm --help` stays quick.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cllm_core.cli.command import exit_with
from cllm_core.errors import CllmError
from cllm_core.export.config import ExportConfig, ExportDType, ExportFormat


def export(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file or adapter.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder, or .gguf file, to write.", show_default=False)],
    *,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter (folder or Hub id) to merge.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    format: Annotated[
        ExportFormat, typer.Option(help="safetensors: a Hugging Face folder. gguf: one file for llama.cpp.")
    ] = "safetensors",
    dtype: Annotated[ExportDType, typer.Option(help="Number format of the matrices. auto: the checkpoint's.")] = "auto",
    layers: Annotated[
        int | None, typer.Option(help="Keep the first so many layers: a student to distil, fast and not yet able.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Let transformers run code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Write a model, its adapter merged into the weights, in a form that other programs load."""
    from cllm_core.export.run import export_model  # noqa: PLC0415

    console = Console(stderr=True)
    try:
        config = ExportConfig(
            model=model,
            output=output,
            adapter=adapter,
            revision=revision,
            format=format,
            dtype=dtype,
            layers=layers,
            trust_remote_code=trust_remote_code,
        )
        with console.status("loading") as status:
            path = export_model(config, lambda stage, fraction: status.update(f"{stage} ({fraction:.0%})"))
    except CllmError as error:
        exit_with(str(error))
    console.print(f"[bold]{path}[/]")
