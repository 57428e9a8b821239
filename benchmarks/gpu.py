"""One run on a CUDA device: is it right, how long is a step, how fast is decoding, how near to the memory's limit.

    python -m benchmarks.gpu --out benchmarks/results/gpu [--model FOLDER] [--seconds 480]

Checks Jacobi output on the device in float32 against transformers on the CPU, token for token; then times steps over
rows and window lengths and decodes AR and Jacobi, for a small model and for random weights in the shape of a 7B Llama.
Writes OUT.json and OUT.md. Parts that do not fit into --seconds any more are named in the report as left out.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from cllm_core.config import EngineConfig
from cllm_core.engine.build import assemble_engine, build_engine
from cllm_core.engine.engine import Engine
from cllm_core.info import TokenizerBundle
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.loader import LoadedModel
from cllm_core.models.model import PagedModel
from cllm_core.models.paged import RowSpan
from cllm_core.request import NewRequest, SamplingParams

ROWS = (1, 4, 16, 64)
WINDOWS = (1, 4, 8, 16, 32, 64)
CONTEXT = 512  # tokens before the window
BLOCK_SIZE = 16
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
    report: dict[str, object] = {"machine": _machine(device), "left_out": []}
    report["correctness"] = check_correctness(device)
    bandwidth = measure_bandwidth(device)
    report["bandwidth_gb_per_second"] = bandwidth / 1e9
    names = ["small"] if arguments.without_7b else ["small", "llama-7b-shape"]
    for name in names:
        engine = _engine(name, arguments.model, device)
        report[name] = _measure_model(engine, bandwidth, deadline, left_out=report["left_out"], name=name)  # type: ignore[arg-type]
        _write(arguments.out, report)
        del engine
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(arguments.out.with_suffix(".md").read_text())


def check_correctness(device: torch.device) -> dict[str, object]:
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
    engine = _assemble(model.to(device).eval(), "correctness")
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
        speeds.append(_decode_speed(engine, requests, block_length))
    return {
        "parameters": engine.info.num_parameters,
        "weight_gb": engine.info.weight_bytes / 1e9,
        "steps": [asdict(step) for step in steps],
        "decoding": [asdict(speed) for speed in speeds],
    }


def _time_step(model: PagedModel, engine: Engine, rows: int, window: int, bandwidth: float) -> StepTime:
    blocks_per_row = -(-(CONTEXT + window) // BLOCK_SIZE)
    spans = [
        RowSpan(row * window, window, CONTEXT, tuple(range(row * blocks_per_row, (row + 1) * blocks_per_row)))
        for row in range(rows)
    ]
    positions = torch.arange(CONTEXT, CONTEXT + window, device=model.device).repeat(rows)
    input_ids = torch.ones_like(positions)
    sampled = torch.arange(rows * window, device=model.device)
    seconds = _median_seconds(lambda: model.forward(input_ids, positions, spans, sampled), model.device)
    read = engine.info.weight_bytes + rows * (CONTEXT + window) * model.cache_bytes_per_token
    return StepTime(rows, window, 1e3 * seconds, read / seconds / bandwidth)


def _decode_speed(engine: Engine, requests: int, block_length: int) -> DecodeSpeed:
    generator = torch.Generator().manual_seed(0)
    vocab = engine.info.vocab_size
    prompts = [tuple(torch.randint(3, vocab, (64,), generator=generator).tolist()) for _ in range(requests)]
    _decode(engine, prompts, block_length, max_tokens=8)
    before = engine.stats().num_steps
    started = time.perf_counter()
    outputs = _decode(engine, prompts, block_length, max_tokens=128)
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, outputs))
    num_passes = (engine.stats().num_steps - before) * requests
    return DecodeSpeed(requests, block_length, num_tokens / seconds, num_tokens / num_passes)


def _decode(engine: Engine, prompts: list[tuple[int, ...]], block_length: int, *, max_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, block_length=block_length)
    for index, prompt in enumerate(prompts):
        engine.add_request(NewRequest(request_id=str(index), prompt_ids=prompt, params=params))
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            outputs[int(output.request_id)] += output.token_ids
    return outputs


def _engine(name: str, folder: str | None, device: torch.device) -> Engine:
    config = _engine_config(folder)
    if name == "small" and folder is not None:
        return build_engine(config)
    dtype = torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(
            SMALL if name == "small" else LLAMA_7B, dtype=dtype, attn_implementation=PAGED_ATTENTION
        )
    return _assemble(model.eval(), name)


def _engine_config(model: str | None) -> EngineConfig:
    return EngineConfig(
        model=model,
        max_num_seqs=max(ROWS),
        max_batched_tokens=2048,
        cache_block_size=BLOCK_SIZE,
        num_cache_blocks=max(ROWS) * (-(-(CONTEXT + max(WINDOWS)) // BLOCK_SIZE) + 1),
        prefix_caching=False,
        adaptive_block_length=False,
    )


def _assemble(model: PreTrainedModel, name: str) -> Engine:
    model.requires_grad_(False)
    loaded = LoadedModel(
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
    return assemble_engine(_engine_config(None), loaded, lambda stage, fraction: None)


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
    for name in ("small", "llama-7b-shape"):
        result = report.get(name)
        if isinstance(result, dict):
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
    yield from ["", "| requests | n | tokens/s | tokens per forward pass |", "|---|---|---|---|"]
    for speed in decoding:
        yield (
            f"| {speed['requests']} | {speed['block_length']} | {speed['tokens_per_second']:.1f} "
            f"| {speed['tokens_per_forward']:.2f} |"
        )


if __name__ == "__main__":
    main()
