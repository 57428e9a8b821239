"""In bfloat16 and 8 bits too, Jacobi output equals AR output where the native kernels compute all layers: sums keep an
order.
"""

from pathlib import Path

import pytest

from cllm_core.backends.cpu.compilation import machine_isas
from cllm_core.backends.cpu.library import load_library
from cllm_core.config import CpuIsaName, EngineConfig, QuantizationName
from cllm_core.engine.build import build_engine
from cllm_core.models.embedded import cache_folder
from cllm_core.request import NewRequest, SamplingParams
from tests.architectures import Architecture
from tests.checkpoints import write_checkpoint
from tests.engine.factories import decode, make_request
from tests.engine.test_exactness import edited, prompts

NUM_NEW = 24


@pytest.fixture(params=machine_isas())
def isa(request: pytest.FixtureRequest) -> CpuIsaName:
    library = load_library(cache_folder())
    if library is None or request.param not in library.isas:
        pytest.skip(f"no C compiler, or no processor with {request.param}")
    name: CpuIsaName = request.param
    return name


def outputs(
    folder: Path,
    requests: list[NewRequest],
    quantization: QuantizationName | None,
    *,
    isa: CpuIsaName,
    block_length: int,
    max_num_seqs: int,
) -> list[list[int]]:
    config = EngineConfig(
        model=str(folder),
        dtype="bfloat16",
        quantization=quantization,
        device="cpu",
        cpu_isa=isa,
        block_length=block_length,
        max_num_seqs=max_num_seqs,
        adaptive_block_length=False,
        cache_memory_gib=0.01,
    )
    return [answer.token_ids for answer in decode(build_engine(config), requests).values()]


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_bf16_jacobi_in_a_batch_equals_ar_alone(
    architecture: Architecture,
    quantization: QuantizationName | None,
    temperature: float,
    isa: CpuIsaName,
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(tmp_path, architecture)
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=NUM_NEW, ignore_eos=True)
    plain = [make_request(str(index), prompt, params) for index, prompt in enumerate(prompts())]
    alone = outputs(folder, plain, quantization, isa=isa, block_length=1, max_num_seqs=1)
    for block_length in (2, 13):
        predicted = [
            make_request(str(index), prompt, params, prediction_ids=edited(text, at=3 * index + 1))
            for index, (prompt, text) in enumerate(zip(prompts(), alone, strict=True))
        ]
        assert outputs(folder, predicted, quantization, isa=isa, block_length=block_length, max_num_seqs=8) == alone
