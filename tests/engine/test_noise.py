"""Laws of the noise: the right distribution, no trace of structure, and the same value wherever it is computed."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cllm_core.engine.noise import gumbel_noise, mix32, position_keys, token_words

CPU = torch.device("cpu")
WORD = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])
SEED = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**63 - 1, -(2**63)])


def mix_reference(word: int) -> int:
    word ^= word >> 16
    word = word * 0x21F0AAAD % 2**32
    word ^= word >> 15
    word = word * 0x735A2D97 % 2**32
    return word ^ word >> 15


def key_reference(lane: int, seed: int, choice_index: int, output_position: int) -> int:
    state = lane
    for word in (seed % 2**32, seed % 2**64 // 2**32, choice_index, output_position):
        state = mix_reference((state + 0x9E3779B9) % 2**32 ^ word)
    return state


def make_noise(*, seed: int = 0, choice: int = 0, first: int = 0, positions: int = 1, vocab: int = 1000) -> Tensor:
    output_position = torch.arange(first, first + positions)
    keys = position_keys(
        torch.full_like(output_position, seed), torch.full_like(output_position, choice), output_position
    )
    return gumbel_noise(keys, token_words(vocab, CPU))


@given(st.lists(WORD, min_size=1, max_size=20))
def test_mixing_equals_arithmetic_on_unbounded_integers(words: list[int]) -> None:
    assert mix32(torch.tensor(words)).tolist() == [mix_reference(word) for word in words]


def test_mixing_never_maps_two_words_to_one() -> None:
    words = torch.cat([torch.arange(2**18), torch.arange(2**32 - 2**18, 2**32), torch.arange(2**18, 2**32, 2**14)])
    assert len(mix32(words).unique()) == len(words.unique())


@given(SEED, st.integers(0, 1000), st.integers(0, 2**31))
def test_keys_equal_arithmetic_on_unbounded_integers(seed: int, choice_index: int, output_position: int) -> None:
    keys = position_keys(torch.tensor([seed]), torch.tensor([choice_index]), torch.tensor([output_position]))
    expected = [key_reference(lane, seed, choice_index, output_position) for lane in (0x6A09E667, 0xBB67AE85)]
    assert keys.tolist() == [expected]


@given(WORD, WORD, WORD)
def test_noise_equals_arithmetic_on_unbounded_integers(key_0: int, key_1: int, word: int) -> None:
    uniform = (mix_reference(word * (key_0 // 2 | 1) % 2**32 ^ key_1) + 0.5) / 2**32
    assume(uniform < 0.99)  # farther up float32 is coarse
    noise = gumbel_noise(torch.tensor([[key_0, key_1]]), torch.tensor([word])).item()
    assert noise == pytest.approx(-math.log(-math.log1p(-uniform)), abs=1e-4)


def test_every_bit_of_seed_choice_and_position_flips_about_half_of_the_key() -> None:
    bits = torch.tensor([1 << bit if bit < 63 else -(2**63) for bit in range(64)])
    zeros = torch.zeros(64, dtype=torch.int64)
    base = position_keys(zeros, zeros, zeros)
    for words in ((bits, zeros, zeros), (zeros, bits[:32], zeros), (zeros, zeros, bits[:32])):
        size = min(map(len, words))
        flipped = position_keys(*(word[:size] for word in words)) ^ base[:size]
        counts = [sum(int(lane).bit_count() for lane in key) for key in flipped.tolist()]
        assert min(counts) > 12
        assert abs(sum(counts) / size - 32) < 3


def test_noise_has_the_gumbel_distribution() -> None:
    noise = make_noise(seed=7, positions=100, vocab=2000).double().flatten()
    assert stats.kstest(noise.numpy(), stats.gumbel_r.cdf).pvalue > 0.01
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=4 * math.pi / math.sqrt(6 * len(noise)))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("bound", [6.0, 9.0, 12.0])
def test_large_noise_is_as_frequent_as_it_should_be(bound: float) -> None:
    noise = make_noise(seed=1, positions=100, vocab=50_000)
    expected = noise.numel() * -math.expm1(-math.exp(-bound))
    assert abs((noise > bound).sum().item() - expected) < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"first": 0}, {"first": 1}),
        ({"first": 0}, {"first": 2**16}),
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 5}, {"seed": 5 + 2**32}),
        ({"seed": 5}, {"seed": -5}),
        ({"choice": 0}, {"choice": 1}),
        ({"seed": 0, "choice": 1}, {"seed": 1, "choice": 0}),
        ({"choice": 0, "first": 1}, {"choice": 1, "first": 0}),
    ],
)
def test_noise_of_different_keys_is_uncorrelated(left: dict[str, int], right: dict[str, int]) -> None:
    one, other = (make_noise(positions=1, vocab=200_000, **key).flatten() for key in (left, right))
    correlation = torch.corrcoef(torch.stack((one, other)))[0, 1].item()
    assert abs(correlation) < 4.5 / math.sqrt(len(one))


def test_noise_is_uncorrelated_where_keys_differ_little_in_one_or_both_words() -> None:
    keys = torch.tensor([[4, 1], [4, 2], [8, 1], [8, 2], [4, 1 + 2**31], [12, 3]])
    correlations = torch.corrcoef(gumbel_noise(keys, token_words(500_000, CPU)).double())
    assert (correlations - torch.eye(6)).abs().max().item() < 4.5 / math.sqrt(500_000)


@pytest.mark.parametrize("lag", [1, 2, 16, 1024])
def test_noise_of_neighbouring_tokens_and_positions_is_uncorrelated(lag: int) -> None:
    noise = make_noise(seed=3, positions=1100, vocab=1100)
    for one, other in ((noise[:, lag:], noise[:, :-lag]), (noise[lag:], noise[:-lag])):
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].item()
        assert abs(correlation) < 4.5 / math.sqrt(one.numel())


def test_noise_ignores_the_batch_and_the_size_of_the_vocabulary() -> None:
    together = make_noise(seed=11, positions=9, vocab=50_257)
    for position in range(9):
        assert torch.equal(make_noise(seed=11, first=position, vocab=777)[0], together[position, :777])


def unmix(word: int) -> int:
    for shift, multiplier in ((15, 0x735A2D97), (15, 0x21F0AAAD), (16, 1)):
        word ^= word >> shift ^ word >> 2 * shift
        word = word * pow(multiplier, -1, 2**32) % 2**32
    return word


@pytest.mark.parametrize(("hashed", "noise"), [(0, 22.874), (1, 21.775), (2**31, 0.36651), (2**32 - 1, -2.8115)])
def test_the_extremes_of_the_hash_give_finite_noise_and_a_long_right_tail(hashed: int, noise: float) -> None:
    words = torch.tensor([unmix(hashed)])
    assert mix32(words).item() == hashed
    assert gumbel_noise(torch.zeros(1, 2, dtype=torch.int64), words).item() == pytest.approx(noise, abs=1e-3)


@pytest.mark.gpu
def test_cuda_noise_equals_cpu_noise_up_to_rounding() -> None:
    keys = position_keys(torch.arange(64), torch.zeros(64, dtype=torch.int64), torch.arange(64))
    on_cpu = gumbel_noise(keys, token_words(50_257, CPU))
    on_cuda = gumbel_noise(keys.cuda(), token_words(50_257, torch.device("cuda"))).cpu()
    assert torch.allclose(on_cpu, on_cuda, rtol=1e-5, atol=1e-5)
