"""One run on a CUDA device: is it right, how long is a step, how fast is decoding, how near to the memory's limit.

    python -m benchmarks.gpu --out benchmarks/results/gpu [--model FOLDER] [--seconds 480]

Checks Jacobi output on the device in float32 against transformers on the CPU, token for token, and the logits of fused
layers in bfloat16 against those of plain ones. Then times steps over rows and window lengths and decodes AR and Jacobi,
for a small model and for random weights in the shape of a 7B Llama; all of it with and without CUDA graphs. Profiles
the kernels of single steps. Writes OUT.json and OUT.md. Parts that do not fit into --seconds any more are named in the
report as left out. What is wrong is named there too, and the run ends with an error once everything is written.
"""

import argparse
import copy
import gc
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.kernel_profile import KernelProfile, profile_kernels
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.config import EngineConfig
from cllm_core.engine.build import assemble_engine
from cllm_core.engine.engine import Engine
from cllm_core.info import TokenizerBundle
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.loader import LoadedModel, load_model
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
CHECKED = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 4, "vocab_size": 2048})
MAX_BATCHED_TOKENS = max(ROWS) * max(WINDOWS)
NUM_SUMS = 20  # between two waits for the device: launching and waiting take as long as a twentieth of one sum
NUM_TEXTS = 8
NUM_CHECKED_STEPS = 24
# Seen on a CPU between bfloat16 and float32: 0.06, and two ways to round differ by more. Attention that loses sight of
# tokens gives 0.8 and more.
MAX_RELATIVE_ERROR = 0.15

Step = tuple[Tensor, Tensor, list[RowSpan], Tensor]  # see PagedModel.forward


@dataclass(frozen=True, slots=True)
class StepTime:
    """Median time of one forward pass."""

    rows: int
    window: int
    milliseconds: float
    bandwidth_share: float  # see ReadLimit.share


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Greedy decoding of `requests` at once."""

    requests: int
    block_length: int
    tokens_per_second: float
    tokens_per_forward: float
    milliseconds_per_forward: float  # everything outside of the forward pass included
    bandwidth_share: float  # see ReadLimit.share; of the weights alone


@dataclass(frozen=True, slots=True)
class ReadLimit:
    """What a step cannot be faster than: reading a model's weights.

    Attributes:
        bytes_per_second: see `measure_bandwidth`.
        weight_bytes: see `bytes_read`.
    """

    bytes_per_second: float
    weight_bytes: int

    def share(self, seconds: float, cache_bytes: int = 0) -> float:
        """Bytes of weights and cache that a step of this time reads per second, over what sums read per second."""
        return (self.weight_bytes + cache_bytes) / seconds / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Run:
    """What the parts of a run share.

    Attributes:
        device: of the run.
        deadline: time.monotonic() after which no part begins.
        left_out: parts that had no time.
        failures: what is wrong, in words.
    """

    device: torch.device
    deadline: float
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def has_time(self, part: str) -> bool:
        """Whether there is time for a part; where there is none, it is noted as left out."""
        if time.monotonic() <= self.deadline:
            return True
        self.left_out.append(part)
        return False


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result files without ending")
    parser.add_argument("--model", help="checkpoint folder of the small model; left out: random weights")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for everything")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tries the script itself")
    parser.add_argument("--without-7b", action="store_true", help="leave the 7B shape out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    run = Run(device, time.monotonic() + arguments.seconds)
    register_paged_attention()
    report: dict[str, object] = {
        "machine": describe_machine(device),
        "failures": run.failures,
        "left_out": run.left_out,
    }
    modes = (True, False) if device.type == "cuda" else (False,)
    report["correctness"] = {_mode(graphs): check_correctness(run, graphs=graphs) for graphs in modes}
    bandwidth = measure_bandwidth(device)
    report["bandwidth_gb_per_second"] = bandwidth / 1e9
    _write(arguments.out, report)
    names = ["small"] if arguments.without_7b else ["small", "llama-7b-shape"]
    for name in names:
        # Graphs first: should the time run out, their figures matter more.
        for graphs in modes:
            part = f"{name}, {_mode(graphs)}"
            if run.has_time(part):
                loaded = _loaded_model(name, arguments.model, device)  # anew, since an engine changes its layers
                limit = ReadLimit(bandwidth, bytes_read(loaded.model))
                engine = _assemble(loaded, graphs=graphs)
                report[part] = _measure_model(engine, limit, run, graphs=graphs, name=part)
                del engine, loaded
                _free_memory(device)
            _write(arguments.out, report)
    print(arguments.out.with_suffix(".md").read_text())
    if run.failures:
        raise SystemExit("\n".join(run.failures))


def check_correctness(run: Run, *, graphs: bool) -> dict[str, object]:
    """Tokens in float32 and logits in bfloat16; what is wrong goes to the run's failures."""
    found: dict[str, object] = {}
    for check in (_check_tokens, _check_logits):
        found |= check(run, graphs=graphs)
        # An engine is a cycle of references: left to itself, its graphs are destroyed inside of a later capture.
        _free_memory(run.device)
    return found


def _check_tokens(run: Run, *, graphs: bool) -> dict[str, object]:
    """Jacobi in float32 on the device against transformers' greedy generate on the CPU."""
    reference = random_model(CHECKED, torch.float32, attention="sdpa")
    _draw_weights(reference)
    prompts = [torch.randint(3, CHECKED.vocab_size, (1, length)) for length in (1, 7, 40, 130)]
    settings = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
    expected = [
        reference.generate(p, **settings)[0, p.shape[1] :].tolist()  # type: ignore[operator]
        for p in prompts
    ]
    model = random_model(CHECKED, torch.float32)
    model.load_state_dict(reference.state_dict())
    model.to(run.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    engine = _assemble(_described(model, "correctness"), graphs=graphs)
    torch.backends.cuda.matmul.allow_tf32 = False
    part, num_equal = f"float32 {_mode(graphs)}", 0
    for block_length in (1, 2, 5, 16, 32):
        outputs = _decode(engine, [tuple(p[0].tolist()) for p in prompts], block_length, max_tokens=48)
        for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            if got == want:
                num_equal += len(want)
            else:
                first = [one == other for one, other in zip(got, want, strict=True)].index(False)
                difference = f"token {first} is {got[first]}, on the CPU {want[first]}"
                run.failures.append(f"{part}, n = {block_length}, prompt {index}: {difference}")
    engine.check()
    run.failures.extend(f"{part}: {path}" for path in slow_paths(_paged_model(engine), run.device, graphs=graphs))
    return {"tokens_equal": num_equal, "block_lengths": [1, 2, 5, 16, 32]}


def _check_logits(run: Run, *, graphs: bool) -> dict[str, object]:
    """Mixed steps in bfloat16, which alone has fused layers and tensor cores, against a plain model on the device."""
    model = random_model(CHECKED, torch.bfloat16)
    _draw_weights(model)
    model.to(run.device)  # type: ignore[arg-type]
    plain = TorchBackend().prepare(copy.deepcopy(model))
    engine = _assemble(_described(model, "correctness"), graphs=graphs)
    found = _paged_model(engine)
    plain.allocate_cache(num_blocks=engine.info.num_cache_blocks, block_size=BLOCK_SIZE)
    steps = mixed_steps(engine.info.num_cache_blocks, run.device)
    errors = torch.tensor([relative_error(found.forward(*step), plain.forward(*step)) for step in steps])
    part = f"bfloat16 {_mode(graphs)}"
    if not (errors < MAX_RELATIVE_ERROR).all():
        run.failures.append(f"{part}: logits differ from those of a plain model by {errors.max():.2g} of their size")
    run.failures.extend(f"{part}: {path}" for path in slow_paths(found, run.device, graphs=graphs))
    return {"logits_error": float(errors.max()), "steps": len(errors)}


def random_model(config: LlamaConfig, dtype: torch.dtype, *, attention: str = PAGED_ATTENTION) -> PreTrainedModel:
    """Random weights in this shape, on the default device."""
    own = copy.deepcopy(config)  # transformers notes the attention in the very config that it is given
    model: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=attention)
    model.eval()
    return model


def _draw_weights(model: PreTrainedModel) -> None:
    """Wide enough that greedy output varies, and that attention picks some tokens rather than their mean."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)


def slow_paths(model: PagedModel, device: torch.device, *, graphs: bool) -> list[str]:
    """What a model that has run steps falls back to on a CUDA device; results are right then, but of other code."""
    if device.type != "cuda":
        return []
    checked = {"attention": model.paths.attention}
    if model.dtype != torch.float32:  # whose layers stay those of transformers
        checked["layers"] = model.paths.layers
    found = [f"{part}: {path}" for part, path in checked.items() if path.reason is not None]
    return found if model.num_graphs or not graphs else [*found, f"no CUDA graphs: {model.paths.graphs}"]


def mixed_steps(num_cache_blocks: int, device: torch.device) -> Iterator[Step]:
    """Steps in which some of a few texts go on by a token, a window or a prompt each, in blocks of random order."""
    draw = random.Random(0)
    lengths = [0] * NUM_TEXTS
    blocks_per_text = num_cache_blocks // NUM_TEXTS
    blocks = draw.sample(range(num_cache_blocks), num_cache_blocks)
    for _ in range(NUM_CHECKED_STEPS):
        rows, num_tokens = [], 0
        for text in draw.sample(range(NUM_TEXTS), draw.randint(1, NUM_TEXTS)):
            start, num_new = lengths[text], draw.choice((1, 16, 130))
            first_block = text * blocks_per_text
            num_blocks = -(-(start + num_new) // BLOCK_SIZE)
            rows.append(RowSpan(num_tokens, num_new, start, tuple(blocks[first_block : first_block + num_blocks])))
            lengths[text] += num_new
            num_tokens += num_new
        input_ids = torch.tensor([draw.randrange(CHECKED.vocab_size) for _ in range(num_tokens)], device=device)
        positions = torch.cat([torch.arange(row.first_position, row.context_length) for row in rows]).to(device)
        yield input_ids, positions, rows, torch.arange(num_tokens, device=device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Size of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def measure_bandwidth(device: torch.device) -> float:
    """Bytes read per second by summing a large tensor: what a step that only reads its weights could reach."""
    data = torch.ones(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)

    def sums() -> None:
        for _ in range(NUM_SUMS):
            data.sum()

    return NUM_SUMS * data.nbytes / _median_seconds(sums, device)


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step of few tokens reads: of an embedding that is no output layer, nearly none.

    To be asked before an engine is made, which may take weights out of the model.
    """
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if not isinstance(embedding, Tensor):
        raise TypeError("an embedding without a weight")
    return num_bytes if output is embedding else num_bytes - embedding.nbytes


def _measure_model(engine: Engine, limit: ReadLimit, run: Run, *, graphs: bool, name: str) -> dict[str, object]:
    model = _paged_model(engine)
    steps = [
        _time_step(model, rows, window, limit)
        for rows in ROWS
        for window in WINDOWS
        if run.has_time(f"{name}: step of {rows} x {window}")
    ]
    speeds = [
        _decode_speed(engine, requests, block_length, limit)
        for requests, block_length in [(1, 1), (1, 16), (1, 32), (16, 1), (16, 16), (32, 1), (32, 16)]
        if run.has_time(f"{name}: decoding {requests} requests at n = {block_length}")
    ]
    if steps or speeds:
        run.failures.extend(f"{name}: {path}" for path in slow_paths(model, run.device, graphs=graphs))
    profiles = {
        f"{rows} x {window}": _profile_step(model, rows, window)
        for rows, window in PROFILED
        if run.has_time(f"{name}: profile of {rows} x {window}")
    }
    return {
        "parameters": engine.info.num_parameters,
        "weight_gb": engine.info.weight_bytes / 1e9,
        "steps": [asdict(step) for step in steps],
        "decoding": [asdict(speed) for speed in speeds],
        "profiles": {step: asdict(found) for step, found in profiles.items() if found is not None},
    }


def _paged_model(engine: Engine) -> PagedModel:
    model = engine.runner.model
    if not isinstance(model, PagedModel):
        raise TypeError("the engine does not run a PagedModel")
    return model


def _time_step(model: PagedModel, rows: int, window: int, limit: ReadLimit) -> StepTime:
    seconds = _median_seconds(_step(model, rows, window), model.device)
    cache_bytes = rows * (CONTEXT + window) * model.cache_bytes_per_token
    return StepTime(rows, window, 1e3 * seconds, limit.share(seconds, cache_bytes))


def _profile_step(model: PagedModel, rows: int, window: int) -> KernelProfile | None:
    if model.device.type != "cuda":
        return None
    step = _step(model, rows, window)
    step()
    torch.cuda.synchronize(model.device)  # or the profile would hold kernels of this step too
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


def _decode_speed(engine: Engine, requests: int, block_length: int, limit: ReadLimit) -> DecodeSpeed:
    generator = torch.Generator().manual_seed(0)
    vocab = engine.info.vocab_size
    prompts = [tuple(torch.randint(3, vocab, (64,), generator=generator).tolist()) for _ in range(requests)]
    # The same first: its steps have the shapes that the timed ones would otherwise compile and capture.
    _decode(engine, prompts, block_length, max_tokens=128)
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
        bandwidth_share=limit.share(seconds / num_steps),
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
        model = random_model(shape, torch.bfloat16)
    return _described(model, name)


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
        max_batched_tokens=MAX_BATCHED_TOKENS,
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


def describe_machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() or "unknown"


def _write(out: Path, report: dict[str, object]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text("\n".join(_markdown(report)) + "\n")


def _markdown(report: dict[str, object]) -> Iterator[str]:
    yield "# Engine on a CUDA device"
    yield ""
    for key in ("machine", "failures", "correctness", "bandwidth_gb_per_second", "left_out"):
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
