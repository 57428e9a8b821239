"""Matrix products of the C kernels by instruction set and number of tokens, against oneDNN's.

    python -m benchmarks.cpu_kernels [--tokens 1 8 16 ...] [--isas amx avx2 ...] [--shapes 576x960 ...] [--threads 1]

Every way computes the products of `--copies` layers with weights of their own, which no cache holds all of, round by
round and in turns. Prints the shortest time of each as a table in Markdown, milliseconds for all copies.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.library import KernelLibrary, load_library
from cllm_core.backends.cpu.onednn import onednn_gap, pack_weight
from cllm_core.backends.cpu.weights import INT8_GROUP, PanelWeight
from cllm_core.models.embedded import cache_folder

# Inputs and outputs of the products of a layer of SmolLM2-135M: queries, keys and values; output; gate and up; down.
SHAPES = ("576x960", "576x576", "576x3072", "1536x576")
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)

Products = Callable[[dict[int, Tensor]], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison that the command line asks for."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    library = load_library(cache_folder())
    if library is None:
        raise SystemExit("there are no C kernels here; the warning above says why")
    shapes = [_shape(text) for text in options.shapes]
    ways = _ways(library, options.isas or library.isas, shapes, options.copies)
    times = _measure(ways, shapes, options.tokens, options.rounds)
    print(f"{_processor()}, {options.threads} threads, {options.copies} x {', '.join(options.shapes)}, ms\n")
    print("\n".join(table(times, options.tokens)))


def table(times: dict[str, dict[int, float]], tokens: Sequence[int]) -> list[str]:
    """Lines of a table in Markdown: seconds by way and number of tokens, shown in milliseconds."""
    rows = [["tokens", *map(str, tokens)], ["---"] * (len(tokens) + 1)]
    rows += [[name, *(f"{1e3 * by_tokens[num]:.2f}" for num in tokens)] for name, by_tokens in times.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--isas", nargs="+", help="left out: all that this processor has")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="INPUTSxOUTPUTS of the products of a layer")
    parser.add_argument("--copies", type=int, default=30, help="layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(argv)


def _shape(text: str) -> tuple[int, int]:
    num_in, _, num_out = text.partition("x")
    return int(num_in), int(num_out)


def _ways(
    library: KernelLibrary, isas: Sequence[str], shapes: Sequence[tuple[int, int]], copies: int
) -> dict[str, Products]:
    """What computes the products, by name; weights are shared by those that can."""
    plain = [torch.randn(num_out, num_in).bfloat16() for _ in range(copies) for num_in, num_out in shapes]
    panels = [PanelWeight.of(weight) for weight in plain]
    ways = {isa: _by_kernels(Kernels(library.library, isa), panels) for isa in isas}
    if all(num_in % INT8_GROUP == 0 for num_in, _ in shapes):
        rounded = [weight.to_int8() for weight in panels]
        ways |= {f"{isa}, int8": _by_kernels(Kernels(library.library, isa), rounded) for isa in isas}
    if onednn_gap(nn.Linear(1, 1, dtype=torch.bfloat16)) is None:
        ways["oneDNN"] = _by_onednn([(weight.shape[1], pack_weight(weight)) for weight in plain])
    return ways


def _by_kernels(kernels: Kernels, weights: Sequence[PanelWeight]) -> Products:
    def multiply(inputs: dict[int, Tensor]) -> None:
        for weight in weights:
            kernels.linear(inputs[weight.num_in], weight)

    return multiply


def _by_onednn(weights: Sequence[tuple[int, Tensor]]) -> Products:
    def multiply(inputs: dict[int, Tensor]) -> None:
        for num_in, weight in weights:
            torch.ops.mkldnn._linear_pointwise(inputs[num_in], weight, None, "none", [], "")

    return multiply


def _measure(
    ways: dict[str, Products], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], rounds: int
) -> dict[str, dict[int, float]]:
    """Shortest seconds by way and number of tokens."""
    times: dict[str, dict[int, float]] = {name: {} for name in ways}
    for num_tokens in tokens:
        inputs = {num_in: torch.randn(num_tokens, num_in).bfloat16() for num_in, _ in shapes}
        for _ in range(rounds):
            for name, multiply in ways.items():
                started = time.perf_counter()
                multiply(inputs)
                taken = time.perf_counter() - started
                times[name][num_tokens] = min(taken, times[name].get(num_tokens, taken))
    return times


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
