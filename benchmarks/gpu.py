"""One run on a CUDA device: is it right, how long is a step, how fast is decoding, how near to the memory's limit.

    python -m benchmarks.gpu --out benchmarks/results/gpu [--model FOLDER] [--seconds 480]

Checks Jacobi output on the device in float32 against transformers on the CPU, token for token; then times steps over
rows and window lengths and decodes AR and Jacobi, for a small model and for random weights in the shape of a 7B Llama;
all of it with and without CUDA graphs. Profiles the kernels of single steps. Writes OUT.json and OUT.md. Parts that do
not fit into --seconds any more are named in the report as left out.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.kernel_profile import KernelProfile, profile_kernels
from cllm_core.config import EngineConfig
from cllm_core.engine.build import assemble_engine
from cllm_core.engine.engine import Engine
from cllm_core.info import TokenizerBundle
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.loader import LoadedModel, load_model
from cllm_core.models.model import PagedModel
from cllm_core.models.paged import RowSpan
from cllm_core.request import NewRequest, SamplingParams

ROWS = (1, 4, 16, 64)
WINDOWS = (1, 4, 8, 16, 32, 64)
CONTEXT = 512  # tokens before the window
BLOCK_SIZE = 16
PROFILED = ((1, 1), (1, 32), (16, 16))  # rows, window
NUM_TIMINGS = 10
LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
SMALL = LlamaConfig(  # the shape of SmolLM2-135M, where no --model is given
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Median time of one forward pass."""

    rows: int
    window: int
    milliseconds: float
    bandwidth_share: float  # bytes of weights and cache read per second, over what a plain copy reads per second


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Greedy decoding of `requests` at once."""

    requests: int
    block_length: int
    tokens_per_second: float
    tokens_per_forward: float
    milliseconds_per_forward: float  # everything outside of the forward pass included
    bandwidth_share: float  # bytes of weights read per second, over what a plain copy reads per second


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result files without ending")
    parser.add_argument("--model", help="checkpoint folder of the small model; left out: random weights")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for everything")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tries the script itself")
    parser.add_argument("--without-7b", action="store_true", help="leave the 7B shape out")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    register_paged_attention()
    report: dict[str, object] = {"machine": _machine(device)}
    modes = (True, False) if device.type == "cuda" else (False,)
    report["correctness"] = {_mode(graphs): check_correctness(device, graphs=graphs) for graphs in modes}
    bandwidth = measure_bandwidth(device)
    report["bandwidth_gb_per_second"] = bandwidth / 1e9
    names = ["small"] if arguments.without_7b else ["small", "llama-7b-shape"]
    left_out: list[str] = []
    report["left_out"] = left_out
    for name in names:
        # Graphs first: should the time run out, their figures matter more.
        for graphs in modes:
            loaded = _loaded_model(name, arguments.model, device)  # anew, since an engine changes its layers
            part = f"{name}, {_mode(graphs)}"
            engine = _assemble(loaded, graphs=graphs)
            report[part] = _measure_model(engine, bandwidth, deadline, left_out=left_out, name=part)
            _write(arguments.out, report)
            del engine, loaded
            _free_memory(device)
    print(arguments.out.with_suffix(".md").read_text())


def check_correctness(device: torch.device, *, graphs: bool) -> dict[str, object]:
    """Jacobi in float32 on the device against transformers' greedy generate on the CPU; raises where they differ."""
    config = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 4, "vocab_size": 2048})
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = [torch.randint(3, 2048, (1, length)) for length in (1, 7, 40, 130)]
    expected = [
        reference.generate(p, max_new_tokens=48, do_sample=False, eos_token_id=None)[0, p.shape[1] :].tolist()
        for p in prompts
    ]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PAGED_ATTENTION)
    model.load_state_dict(reference.state_dict())
    engine = _assemble(_described(model.to(device).eval(), "correctness"), graphs=graphs)
    torch.backends.cuda.matmul.allow_tf32 = False
    checked = 0
    for block_length in (1, 2, 5, 16, 32):
        outputs = _decode(engine, [tuple(p[0].tolist()) for p in prompts], block_length, max_tokens=48)
        for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            if got != want:
                raise SystemExit(f"block length {block_length}, prompt {index}: device gives {got}, CPU {want}")
            checked += len(want)
    engine.check()
    return {"tokens_equal": checked, "block_lengths": [1, 2, 5, 16, 32]}


def measure_bandwidth(device: torch.device) -> float:
    """Bytes read per second by summing a large tensor: what a step that only reads its weights could reach."""
    data = torch.ones(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    return data.nbytes / _median_seconds(data.sum, device)


def _measure_model(
    engine: Engine, bandwidth: float, deadline: float, *, left_out: list[str], name: str
) -> dict[str, object]:
    model = engine.runner.model
    if not isinstance(model, PagedModel):
        raise SystemExit("the engine does not run a PagedModel")
    steps = []
    for rows in ROWS:
        for window in WINDOWS:
            if time.monotonic() > deadline:
                left_out.append(f"{name}: step of {rows} x {window}")
            elif rows * window <= 2048:
                steps.append(_time_step(model, engine, rows, window, bandwidth))
    speeds = []
    for requests, block_length in [(1, 1), (1, 16), (1, 32), (16, 1), (16, 16), (32, 1), (32, 16)]:
        if time.monotonic() > deadline:
            left_out.append(f"{name}: decoding {requests} requests at n = {block_length}")
            continue
        speeds.append(_decode_speed(engine, requests, block_length, bandwidth))
    profiles = {f"{rows} x {window}": _profile_step(model, rows, window) for rows, window in PROFILED}
    return {
        "parameters": engine.info.num_parameters,
        "weight_gb": engine.info.weight_bytes / 1e9,
        "steps": [asdict(step) for step in steps],
        "decoding": [asdict(speed) for speed in speeds],
        "profiles": {step: asdict(found) for step, found in profiles.items() if found is not None},
    }


def _time_step(model: PagedModel, engine: Engine, rows: int, window: int, bandwidth: float) -> StepTime:
    seconds = _median_seconds(_step(model, rows, window), model.device)
    read = engine.info.weight_bytes + rows * (CONTEXT + window) * model.cache_bytes_per_token
    return StepTime(rows, window, 1e3 * seconds, read / seconds / bandwidth)


def _profile_step(model: PagedModel, rows: int, window: int) -> KernelProfile | None:
    if model.device.type != "cuda":
        return None
    step = _step(model, rows, window)
    step()
    return profile_kernels(step, model.device)


def _step(model: PagedModel, rows: int, window: int) -> Callable[[], object]:
    """A forward pass of this size, to be called again and again."""
    blocks_per_row = -(-(CONTEXT + window) // BLOCK_SIZE)
    spans = [
        RowSpan(row * window, window, CONTEXT, tuple(range(row * blocks_per_row, (row + 1) * blocks_per_row)))
        for row in range(rows)
    ]
    positions = torch.arange(CONTEXT, CONTEXT + window, device=model.device).repeat(rows)
    input_ids = torch.ones_like(positions)
    sampled = torch.arange(rows * window, device=model.device)
    return lambda: model.forward(input_ids, positions, spans, sampled)


def _decode_speed(engine: Engine, requests: int, block_length: int, bandwidth: float) -> DecodeSpeed:
    generator = torch.Generator().manual_seed(0)
    vocab = engine.info.vocab_size
    prompts = [tuple(torch.randint(3, vocab, (64,), generator=generator).tolist()) for _ in range(requests)]
    _decode(engine, prompts, block_length, max_tokens=8)
    before = engine.stats().num_steps
    started = time.perf_counter()
    outputs = _decode(engine, prompts, block_length, max_tokens=128)
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, outputs))
    num_steps = engine.stats().num_steps - before
    return DecodeSpeed(
        requests=requests,
        block_length=block_length,
        tokens_per_second=num_tokens / seconds,
        tokens_per_forward=num_tokens / (num_steps * requests),
        milliseconds_per_forward=1e3 * seconds / num_steps,
        bandwidth_share=engine.info.weight_bytes * num_steps / seconds / bandwidth,
    )


def _decode(engine: Engine, prompts: list[tuple[int, ...]], block_length: int, *, max_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, block_length=block_length)
    for index, prompt in enumerate(prompts):
        engine.add_request(NewRequest(request_id=str(index), prompt_ids=prompt, params=params))
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            outputs[int(output.request_id)] += output.token_ids
    return outputs


def _mode(graphs: bool) -> str:
    return "with CUDA graphs" if graphs else "without CUDA graphs"


def _loaded_model(name: str, folder: str | None, device: torch.device) -> LoadedModel:
    if name == "small" and folder is not None:
        config = msgspec.structs.replace(_engine_config(graphs=False), model=folder, device=device.type)
        return load_model(config, lambda stage, fraction: None, attn_implementation=PAGED_ATTENTION)
    shape = SMALL if name == "small" else LLAMA_7B
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation=PAGED_ATTENTION)
    return _described(model.eval(), name)


def _described(model: PreTrainedModel, name: str) -> LoadedModel:
    model.requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=TokenizerBundle(tokenizer_json=""),
        eos_token_ids=(),
        name=name,
        block_length=None,
        domain=None,
        max_model_len=model.config.max_position_embeddings,
        device=model.device,
        dtype=model.dtype,
    )


def _assemble(loaded: LoadedModel, *, graphs: bool) -> Engine:
    return assemble_engine(_engine_config(graphs=graphs), loaded, lambda stage, fraction: None)


def _engine_config(*, graphs: bool) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=max(ROWS),
        max_batched_tokens=2048,
        cache_block_size=BLOCK_SIZE,
        num_cache_blocks=max(ROWS) * (-(-(CONTEXT + max(WINDOWS)) // BLOCK_SIZE) + 1),
        prefix_caching=False,
        adaptive_block_length=False,
        cuda_graphs=graphs,
    )


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    def timings() -> Iterator[float]:
        for _ in range(NUM_TIMINGS):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield time.perf_counter() - started

    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return statistics.median(timings())


def _machine(device: torch.device) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _write(out: Path, report: dict[str, object]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text("\n".join(_markdown(report)) + "\n")


def _markdown(report: dict[str, object]) -> Iterator[str]:
    yield "# Engine on a CUDA device"
    yield ""
    for key in ("machine", "correctness", "bandwidth_gb_per_second", "left_out"):
        yield f"- {key.replace('_', ' ')}: {report[key]}"
    for name, result in report.items():
        if isinstance(result, dict) and "steps" in result:
            yield from _model_markdown(name, result)


def _model_markdown(name: str, result: dict[str, object]) -> Iterator[str]:
    steps, decoding = result["steps"], result["decoding"]
    if not isinstance(steps, list) or not isinstance(decoding, list):
        raise TypeError("steps and decoding are lists")
    yield from ["", f"## {name}: {result['parameters']} parameters, {result['weight_gb']:.2f} GB", ""]
    yield f"Step time in ms, {CONTEXT} tokens of context a row (share of the memory's read speed)"
    yield from ["", "| rows \\ n | " + " | ".join(map(str, WINDOWS)) + " |", "|---" * (len(WINDOWS) + 1) + "|"]
    for rows in ROWS:
        cells = {
            s["window"]: f"{s['milliseconds']:.2f} ({s['bandwidth_share']:.0%})" for s in steps if s["rows"] == rows
        }
        yield f"| {rows} | " + " | ".join(cells.get(window, "") for window in WINDOWS) + " |"
    yield from [
        "",
        "| requests | n | tokens/s | tokens per forward | ms per forward, all included | weights read, share |",
        "|---" * 6 + "|",
    ]
    for speed in decoding:
        yield (
            f"| {speed['requests']} | {speed['block_length']} | {speed['tokens_per_second']:.1f} "
            f"| {speed['tokens_per_forward']:.2f} | {speed['milliseconds_per_forward']:.2f} "
            f"| {speed['bandwidth_share']:.0%} |"
        )
    yield from _profiles_markdown(result["profiles"])


def _profiles_markdown(profiles: object) -> Iterator[str]:
    if not isinstance(profiles, dict):
        raise TypeError("profiles is a dict")
    for step, found in profiles.items():
        yield ""
        yield (
            f"Kernels of a step of {step}: {found['num_kernels']} in {found['milliseconds']:.2f} ms, "
            f"none running {found['gap_share']:.0%} of it"
        )
        yield from ["", "| kernel | calls | share |", "|---|---|---|"]
        for kernel in found["longest"]:
            yield f"| `{kernel['name'][:80]}` | {kernel['calls']} | {kernel['share']:.1%} |"


if __name__ == "__main__":
    main()
