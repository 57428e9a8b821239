"""`cllm generate` and `cllm chat`: the engine in this terminal, without a server.

torch is imported when a command runs, so that `cllm --help` stays quick.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from cllm_core.cli.command import exit_with
from cllm_core.cli.prompt_file import read_prompt_file
from cllm_core.errors import CllmError, RequestError
from cllm_core.request import DecodingStats, SamplingParams

from ..engine_settings import EngineSettings

if TYPE_CHECKING:
    from cllm_core.llm import LLM, GenerationResult

Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
UseAdapter = Annotated[
    str,
    typer.Option(help="Decode with this adapter, one of those given as --adapter NAME=ADAPTER.", show_default=False),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Output limit in tokens. Left out: the context's end.")]


def generate(
    settings: EngineSettings,
    *,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to complete; give it again for more.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--file", "-f", help='JSON lines with a "prompt" each; - reads standard input.')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a user's message.")] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    use_adapter: UseAdapter = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines with statistics instead of text.")] = False,
) -> None:
    """Complete prompts, all in one batch, and print the outputs."""
    prompts = read_prompts(prompt or [], prompt_file)
    params = _params(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    llm = _load(settings)
    try:
        if chat:
            asked = [[{"role": "user", "content": text}] for text in prompts]
            results = llm.chat(asked, params, adapter=use_adapter)
        else:
            results = llm.generate(prompts, params, adapter=use_adapter)
    except RequestError as error:
        exit_with(str(error))
    for text, result in zip(prompts, results, strict=True):
        sys.stdout.write(_as_json_line(text, result) if as_json else f"{result.text}\n")


def chat(
    settings: EngineSettings,
    *,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    use_adapter: UseAdapter = "",
) -> None:
    """Talk to a model in the terminal and watch its tokens arrive; /reset forgets the conversation, /exit leaves."""
    console = Console()
    params = _params(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    llm = _load(settings)
    opening = [{"role": "system", "content": system}] if system else []
    console.print(f"[bold]{llm.info.name}[/] on {llm.info.device}, block length {llm.info.block_length}. /exit leaves.")
    messages = list(opening)
    while (text := _ask(console)) not in (None, "/exit"):
        if text == "/reset":
            messages = list(opening)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _answer(console, llm, messages, params, adapter=use_adapter)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts given as such and those of a file of JSON lines; ends the command where there are none."""
    prompts = list(given)
    if file is not None:
        prompts += read_prompt_file(file, option="--file")
    if not prompts:
        exit_with("nothing to complete: give --prompt TEXT or --file FILE")
    return prompts


def _params(*, temperature: float, top_p: float, seed: int | None, max_tokens: int | None) -> SamplingParams:
    try:
        return SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    except RequestError as error:
        exit_with(str(error))


def _load(settings: EngineSettings) -> "LLM":
    from cllm_core.llm import LLM  # noqa: PLC0415

    console = Console(stderr=True)
    with console.status("loading") as status:
        try:
            return LLM(
                on_progress=lambda stage, fraction: status.update(f"{stage} ({fraction:.0%})"),
                **msgspec.structs.asdict(settings.to_engine_config()),
            )
        except CllmError as error:
            exit_with(str(error))


def _ask(console: Console) -> str | None:
    """A line from the user; None at the end of input."""
    try:
        return console.input("[bold cyan]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(
    console: Console, llm: "LLM", messages: list[dict[str, str]], params: SamplingParams, *, adapter: str
) -> str | None:
    """Stream one answer to the terminal, reasoning dimmed; Ctrl-C ends it early and keeps what came. None: refused."""
    started = time.perf_counter()
    pieces: list[str] = []
    stats: DecodingStats | None = None
    is_thinking = False
    try:
        for delta, current in llm.stream_chat(messages, params, adapter=adapter):
            stats = current
            console.out(delta.reasoning, end="", style="dim", highlight=False)
            if delta.text and is_thinking:
                console.out("\n")
            is_thinking = not delta.text and (is_thinking or bool(delta.reasoning))
            pieces.append(delta.text)
            console.out(delta.text, end="", highlight=False)
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        console.print(str(error), style="red", markup=False)
        return None
    console.print()
    if stats is not None:
        seconds = time.perf_counter() - started
        console.print(
            f"[dim]{stats.num_output_tokens} tokens in {seconds:.1f} s, "
            f"{stats.num_output_tokens / seconds:.1f} tokens/s, {stats.tokens_per_forward:.2f} per forward pass[/]"
        )
    return "".join(pieces)


def _as_json_line(prompt: str, result: "GenerationResult") -> str:
    output = result.outputs[0]
    record: dict[str, Any] = {
        "prompt": prompt,
        "text": output.text,
        **({"reasoning": output.reasoning} if output.reasoning else {}),
        "finish_reason": output.finish_reason,
        "stats": {**msgspec.structs.asdict(output.stats), "tokens_per_forward": output.stats.tokens_per_forward},
    }
    return msgspec.json.encode(record).decode() + "\n"
