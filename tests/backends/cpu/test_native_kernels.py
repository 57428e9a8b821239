from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cllm_core.backends.cpu.coverage import attention_gap
from cllm_core.backends.cpu.head import NativeEmbedding, NativeHead, replace_output_layer
from cllm_core.backends.cpu.kernels import LANES, Kernels
from cllm_core.backends.cpu.layer_ops import KernelOps
from cllm_core.backends.cpu.onednn import OneDnnOps
from cllm_core.backends.cpu.step import NativeAttention, NativeStep
from cllm_core.backends.cpu.weights import PANEL, PanelWeight, pad_outputs
from cllm_core.backends.fusing import fuse_layers
from cllm_core.backends.paged_model import PagedModel, StepAttention
from cllm_core.backends.torch_plain import GatheredAttention
from cllm_core.models.attention import PAGED_ATTENTION, Scoring, register_paged_attention
from cllm_core.models.paged import KVCache, LayerSpec, PagedStep, RowSpan
from cllm_core.models.probe import probe_layers
from tests.architectures import Architecture
from tests.backends.factories import PATHS
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE, build_model

BF16_ROUNDING = 2**-8


def make_cache(block_size: int, size: int, dtype: torch.dtype) -> KVCache:
    """A cache of 2 KV heads, filled with noise."""
    layers, device = [LayerSpec(2, size, size)], torch.device("cpu")
    cache = KVCache(layers, num_blocks=800 // block_size, block_size=block_size, dtype=dtype, device=device)
    for index, tensor in enumerate((*cache.keys, *cache.values)):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
        tensor.copy_(noise.bfloat16())
    return cache


def to_tiles(keys: torch.Tensor) -> torch.Tensor:
    """The keys of a cache as the kernels keep them, in the same shape."""
    num_blocks, block_size, num_heads, size = keys.shape
    tiles = keys.view(num_blocks, block_size // LANES, LANES, num_heads, size // 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(keys.shape)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("shape", [(16, 64, 6), (32, 16, 2), (16, 80, 14), (64, 256, 2), (16, 64, 38)])
def test_attention_equals_the_slow_path(
    kernels: Kernels, shape: tuple[int, int, int], window: int | None, num_threads: int
) -> None:
    block_size, size, num_heads = shape
    blocks = torch.randperm(800 // block_size, generator=torch.Generator().manual_seed(5)).tolist()
    half = len(blocks) // 2
    rows = [
        RowSpan(0, 16, 290, tuple(blocks[:half])),
        RowSpan(16, 1, 130, tuple(blocks[half:-2]), gap=70),
        RowSpan(17, 2, 5, (blocks[-1],), gap=4),
        RowSpan(19, 1, 0, (blocks[-2],)),
    ]
    query, key, value = (torch.randn(20, heads, size).bfloat16() for heads in (num_heads, 2, 2))
    exact_cache, cache = make_cache(block_size, size, torch.float32), make_cache(block_size, size, torch.bfloat16)
    exact = PagedStep(exact_cache, rows, torch.device("cpu")).attend(
        0, query.float(), key.float(), value.float(), Scoring(size**-0.5, window)
    )
    torch.set_num_threads(num_threads)
    cache.keys[0].copy_(to_tiles(cache.keys[0]))
    out = NativeStep(kernels, cache, rows).attend(0, query, key, value, Scoring(size**-0.5, window))
    torch.set_num_threads(1)
    torch.testing.assert_close(out.float(), exact, rtol=BF16_ROUNDING, atol=1e-5)
    torch.testing.assert_close(cache.keys[0].float(), to_tiles(exact_cache.keys[0]))
    torch.testing.assert_close(cache.values[0].float(), exact_cache.values[0])


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_softcap_and_sinks_equal_the_slow_path(
    kernels: Kernels, has_sinks: bool, softcap: float | None, window: int | None
) -> None:
    rows = [RowSpan(0, 9, 130, tuple(range(9))), RowSpan(9, 2, 0, (9,))]
    query, key, value = (torch.randn(11, heads, 64).bfloat16() for heads in (6, 2, 2))
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0, 6.0, 60.0]).bfloat16() if has_sinks else None
    scoring = Scoring(64**-0.5, window, softcap, sinks)
    exact = PagedStep(make_cache(16, 64, torch.float32), rows, torch.device("cpu")).attend(
        0, query.float(), key.float(), value.float(), scoring
    )
    cache = make_cache(16, 64, torch.bfloat16)
    cache.keys[0].copy_(to_tiles(cache.keys[0]))
    out = NativeStep(kernels, cache, rows).attend(0, query, key, value, scoring)
    torch.testing.assert_close(out.float(), exact, rtol=BF16_ROUNDING, atol=1e-5)


def test_attention_stays_exact_where_scores_are_large(kernels: Kernels) -> None:
    """Scores of some hundreds: the sums of later chunks outweigh earlier ones entirely."""
    rows = [RowSpan(0, 8, 192, tuple(range(13)))]
    query = 40 * torch.randn(8, 2, 64).bfloat16()
    key, value = torch.randn(8, 2, 64).bfloat16(), torch.randn(8, 2, 64).bfloat16()
    exact = PagedStep(make_cache(16, 64, torch.float32), rows, torch.device("cpu")).attend(
        0, query.float(), key.float(), value.float(), Scoring(1.0)
    )
    cache = make_cache(16, 64, torch.bfloat16)
    cache.keys[0].copy_(to_tiles(cache.keys[0]))
    out = NativeStep(kernels, cache, rows).attend(0, query, key, value, Scoring(1.0))
    torch.testing.assert_close(out.float(), exact, rtol=BF16_ROUNDING, atol=1e-4)


@pytest.mark.parametrize("size", [8, 64, 100, 576])
def test_norm_equals_torch(kernels: Kernels, size: int) -> None:
    x, weight = torch.randn(5, 3, size).bfloat16(), torch.randn(size).bfloat16()
    expected = F.rms_norm(x.float(), (size,), weight.float(), 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5).float(), expected, rtol=BF16_ROUNDING, atol=1e-6)
    transposed = kernels.rms_norm(x.transpose(0, 1), weight, 1e-5)
    torch.testing.assert_close(transposed.float(), expected.transpose(0, 1), rtol=BF16_ROUNDING, atol=1e-6)


@pytest.mark.parametrize("size", [16, 64, 80])
def test_rotation_equals_its_formula(kernels: Kernels, size: int) -> None:
    packed = torch.randn(6, 5, size).bfloat16()
    cos, sin = torch.randn(6, size).bfloat16(), torch.randn(6, size).bfloat16()
    heads = packed[:, :3].float()
    swapped = torch.cat((-heads[..., size // 2 :], heads[..., : size // 2]), dim=-1)
    expected, untouched = heads * cos.float()[:, None] + swapped * sin.float()[:, None], packed[:, 3:].clone()
    kernels.apply_rope_(packed[:, :3], cos, sin)
    torch.testing.assert_close(packed[:, :3].float(), expected, rtol=BF16_ROUNDING, atol=1e-6)
    torch.testing.assert_close(packed[:, 3:], untouched, rtol=0, atol=0)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 32, PANEL), (3, 64, 5 * PANEL), (21, 576, 6 * PANEL)])
def test_logits_are_summed_in_float32(kernels: Kernels, shape: tuple[int, int, int], num_threads: int) -> None:
    num_rows, size, vocab_size = shape
    hidden, weight = torch.randn(num_rows, size).bfloat16(), torch.randn(vocab_size, size).bfloat16()
    torch.set_num_threads(num_threads)
    logits = kernels.logits(hidden, PanelWeight.of(weight))
    torch.set_num_threads(1)
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T, rtol=1e-5, atol=1e-4)


def test_a_logit_is_the_same_in_any_batch(kernels: Kernels) -> None:
    hidden, weight = torch.randn(37, 64).bfloat16(), PanelWeight.of(torch.randn(5 * PANEL, 64).bfloat16())
    together = kernels.logits(hidden, weight)
    assert torch.equal(together, torch.cat([kernels.logits(row[None], weight) for row in hidden]))


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE - 5])
def test_the_logits_of_no_tokens_are_none(kernels: Kernels, vocab_size: int) -> None:
    """A chunk in the middle of a prompt wants none, which was an error."""
    weight = PanelWeight.of(pad_outputs(torch.randn(vocab_size, 64).bfloat16()))
    for panels in (weight, weight.to_int8()):
        head = NativeHead(panels, vocab_size, kernels)
        assert head(torch.empty(0, 64).bfloat16()).shape == (0, vocab_size)
        assert head(torch.empty(1, 0, 64).bfloat16()).shape == (1, 0, vocab_size)
        assert head(torch.ones(1, 2, 64).bfloat16()).shape == (1, 2, vocab_size)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE - 5])
def test_only_a_plain_output_layer_is_replaced(kernels: Kernels, vocab_size: int, tied: bool) -> None:
    model = build_model("llama")
    assert replace_output_layer(model, kernels) is not None
    model.resize_token_embeddings(vocab_size)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    ids, weight = torch.arange(6).view(2, 3), model.get_output_embeddings().weight.float()
    expected = model.get_decoder()(input_ids=ids).last_hidden_state
    assert replace_output_layer(model, kernels) is None
    assert isinstance(model.get_input_embeddings(), NativeEmbedding) == tied
    assert torch.equal(model.get_decoder()(input_ids=ids).last_hidden_state, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, expected.float() @ weight.T, rtol=1e-5, atol=1e-4)
    assert replace_output_layer(model, kernels) is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_with_kernels_is_as_near_to_float32_as_without(kernels: Kernels, architecture: Architecture) -> None:
    exact = _logits(architecture, torch.float32, None)
    plain = _logits(architecture, torch.bfloat16, None)
    native = _logits(architecture, torch.bfloat16, kernels)
    assert (native - exact).norm() < 1.5 * (plain - exact).norm()


def test_only_what_the_kernels_cover_is_given_to_them() -> None:
    gap = partial(attention_gap, dtype=torch.bfloat16, block_size=16)
    assert gap([LayerSpec(2, 64, 64), LayerSpec(1, 128, 128)]) is None
    assert "the model is in float32" in str(gap([LayerSpec(2, 64, 64)], dtype=torch.float32))
    assert "heads of 24 and 24" in str(gap([LayerSpec(2, 64, 64), LayerSpec(2, 24, 24)]))
    assert "heads of 192 and 128" in str(gap([LayerSpec(2, 192, 128)]))
    assert "cache blocks of 24 tokens" in str(gap([LayerSpec(2, 64, 64)], block_size=24))


def _logits(architecture: Architecture, dtype: torch.dtype, kernels: Kernels | None) -> torch.Tensor:
    register_paged_attention()
    model = build_model(architecture)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.set_attn_implementation(PAGED_ATTENTION)
    layers = probe_layers(model.requires_grad_(False))
    attention: StepAttention = GatheredAttention(model.device)
    if kernels is not None:
        fuse_layers(model, KernelOps(kernels, OneDnnOps()))
        replace_output_layer(model, kernels)
        if attention_gap(layers, dtype, block_size=16) is None:
            attention = NativeAttention(kernels)
    paged = PagedModel(model, layers, attention, PATHS)
    paged.allocate_cache(num_blocks=16, block_size=16)
    ids = torch.randint(VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(1))
    rows = [RowSpan(0, 37, 0, (3, 9, 1, 4, 12)), RowSpan(37, 4, 0, (0,))]
    positions = torch.tensor([*range(37), *range(4)])
    return paged.forward(ids[:41], positions, rows, torch.arange(41))
