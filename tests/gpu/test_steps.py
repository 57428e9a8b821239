"""Steps on a CUDA device: what they compute with and without graphs, and that the host waits for them once."""

import random
import warnings

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from cllm_core.backends.cuda.attention import KernelAttention, attention_gap
from cllm_core.backends.cuda.graphed_model import GraphedModel
from cllm_core.backends.cuda.graphs import GraphCapture
from cllm_core.backends.cuda.static_steps import Buckets, NotCapturable
from cllm_core.backends.fused_layer import FusedLayer
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import AttentionByTables
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.config import EngineConfig
from cllm_core.engine.memory import step_bytes
from cllm_core.models.paged import RowSpan
from cllm_core.models.probe import probe_layers
from cllm_core.request import SamplingParams
from tests.backends.factories import PATHS
from tests.backends.step_rows import random_rows
from tests.engine.factories import Launches, Reader, decode, greedy_ar, make_request
from tests.gpu.models import LLAMA, QWEN3, VOCAB_SIZE, loaded_model, make_engine

pytestmark = pytest.mark.gpu

NUM_BLOCKS, BLOCK_SIZE = 128, 16
# Seen of bfloat16 on a CPU: 0.045; anything computed wrongly gives about 1.
ROUNDING = 0.15
PROMPTS = [tuple(range(5, 5 + length)) for length in (1, 7, 40, 130, 300)]


def plain(config: LlamaConfig | Qwen3Config, dtype: torch.dtype, device: torch.device) -> PagedModel:
    model = TorchBackend().prepare(loaded_model(config, dtype, device).model)
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return model


def graphed(config: LlamaConfig | Qwen3Config, dtype: torch.dtype, device: torch.device) -> PagedModel:
    """With transformers' layers, whose rounding is that of the plain model."""
    causal_lm = loaded_model(config, dtype, device).model
    layers = probe_layers(causal_lm)
    assert attention_gap(layers, dtype, device) is None
    attention = AttentionByTables(KernelAttention.on(device), device)
    buckets = Buckets.of(max_rows=8, max_tokens=160)
    model = GraphedModel(causal_lm, layers, attention, PATHS, capture=GraphCapture(device), buckets=buckets)
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    model.enable_graphs(max_model_len=1024)
    return model


def random_step(draw: random.Random, device: torch.device) -> tuple[Tensor, Tensor, list[RowSpan], Tensor]:
    rows = random_rows(draw, num_rows=draw.randint(1, 8), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, longest=20)
    num_tokens = sum(row.num_tokens for row in rows)
    ids = torch.tensor([draw.randrange(VOCAB_SIZE) for _ in range(num_tokens)], device=device)
    positions = torch.cat([torch.arange(row.first_position, row.context_length) for row in rows]).to(device)
    return ids, positions, rows, torch.arange(num_tokens, device=device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, ROUNDING)])
def test_replayed_graphs_compute_what_plain_attention_does(
    config: LlamaConfig | Qwen3Config, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    reference, model = plain(config, dtype, device), graphed(config, dtype, device)
    draw = random.Random(0)
    for _ in range(40):
        step = random_step(draw, device)
        expected, found = reference.forward(*step), model.forward(*step)
        assert relative_error(found, expected) < tolerance
    assert model.num_graphs > 3


@pytest.mark.parametrize("graphs", [True, False])
def test_float32_output_equals_transformers_generate_on_the_cpu(graphs: bool, device: torch.device) -> None:
    loaded = loaded_model(LLAMA, torch.float32, torch.device("cpu"))
    loaded.model.set_attn_implementation("eager")
    loaded.model.generation_config.eos_token_id = None
    expected = [greedy_ar(loaded.model, prompt, 40) for prompt in PROMPTS]
    engine = make_engine(loaded_model(LLAMA, torch.float32, device), graphs=graphs)
    for block_length in (1, 5, 16):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, block_length=block_length)
        requests = [
            make_request(str(index), prompt, params, prediction_ids=[*text[:9], 3, *text[10:]])
            for index, (prompt, text) in enumerate(zip(PROMPTS, expected, strict=True))
        ]
        assert [answer.token_ids for answer in decode(engine, requests).values()] == expected


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_fused_layers_of_bfloat16_stay_near_those_of_transformers(
    config: LlamaConfig | Qwen3Config, device: torch.device
) -> None:
    reference = plain(config, torch.bfloat16, device)
    loaded = loaded_model(config, torch.bfloat16, device)
    engine = make_engine(loaded, graphs=True)
    fused = engine.runner.model
    assert isinstance(fused, PagedModel)
    layers = [module for module in loaded.model.modules() if isinstance(module, FusedLayer)]
    assert [layer.rope_store is not None for layer in layers] == [True] * config.num_hidden_layers
    draw = random.Random(1)
    for _ in range(10):  # of several shapes, some of them replayed
        step = random_step(draw, device)
        assert relative_error(fused.forward(*step), reference.forward(*step)) < ROUNDING


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.8, "seed": 1}, {"top_p": 0.9, "seed": 2}])
@pytest.mark.parametrize("block_length", [1, 16])
def test_a_step_waits_for_the_device_nowhere_but_for_its_copy(
    params: dict[str, float], block_length: int, device: torch.device
) -> None:
    """That wait, for an event, is the one that torch does not warn of."""
    engine = make_engine(loaded_model(LLAMA, torch.bfloat16, device), graphs=True)
    reader = Reader(engine)
    settings = SamplingParams(
        **params,  # type: ignore[arg-type]
        max_tokens=200,
        ignore_eos=True,
        block_length=block_length,
    )
    for index in range(4):
        reader.add(make_request(str(index), PROMPTS[index], settings))
    for _ in range(5):
        reader.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        reader.step()
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
    assert not waits


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_launched_ahead_bring_what_steps_one_at_a_time_do(graphs: bool, device: torch.device) -> None:
    kinds = [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}, {"seed": 1}, {"seed": 2, "top_p": 0.9}]
    requests = [
        make_request(
            str(index),
            PROMPTS[index % len(PROMPTS)],
            SamplingParams(
                **kinds[index % len(kinds)],  # type: ignore[arg-type]
                block_length=1,
                max_tokens=60,
                stop_token_ids=tuple(range(index, VOCAB_SIZE, 40)),
            ),
        )
        for index in range(20)
    ]
    engine = make_engine(loaded_model(LLAMA, torch.float32, device), graphs=graphs)
    assert engine.runs_ahead
    launches = Launches(engine)
    ahead = decode(engine, requests)
    assert launches.num_ahead > 20
    engine.runs_ahead = False
    one_at_a_time = decode(engine, requests)
    for name, answer in ahead.items():
        assert (answer.token_ids, answer.finish_reason) == (
            one_at_a_time[name].token_ids,
            one_at_a_time[name].finish_reason,
        )


def test_a_forward_pass_that_waits_for_the_device_is_not_captured(device: torch.device) -> None:
    numbers = torch.ones(3, device=device)

    def work() -> None:
        numbers.mul_(float(numbers.sum()))

    before = torch.cuda.current_stream(device)
    with pytest.raises(NotCapturable, match="waits for the device"):
        GraphCapture(device)(work)
    assert torch.cuda.current_stream(device) == before
    assert float(numbers.sum()) > 0  # the device is as usable as before


def test_steps_stay_within_the_memory_reserved_for_them(device: torch.device) -> None:
    loaded = loaded_model(LLAMA, torch.bfloat16, device)
    config = EngineConfig(max_num_seqs=8, max_batched_tokens=256, num_cache_blocks=400)
    buckets = Buckets.of(max_rows=config.max_num_seqs, max_tokens=config.max_batched_tokens)
    layers, attention = probe_layers(loaded.model), AttentionByTables(KernelAttention.on(device), device)
    model = GraphedModel(loaded.model, layers, attention, PATHS, capture=GraphCapture(device), buckets=buckets)
    reserved = step_bytes(model, config, 1024)
    model.free_cache()
    engine = make_engine(loaded, graphs=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    decode(engine, [make_request(str(index), prompt, params) for index, prompt in enumerate(PROMPTS)])
    assert before - torch.cuda.mem_get_info(device)[0] < reserved
