"""Counter-based Gumbel noise: every (request seed, choice, output position, token id) has one fixed value.

There is no generator state, so the noise of a position does not depend on the batch, on the block length or on how
often the position is predicted before it is accepted. Hashing is integer arithmetic, the same on every device; only
the two logarithms may round differently between devices.
"""

import torch
from torch import Tensor

_WORD_BITS = 32
_WORD_MASK = 2**_WORD_BITS - 1
# Words live in int64 below 2^32 and the multipliers below 2^31, so no product leaves int64.
_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0x735A2D97
# Fractional bits of the golden ratio: keeps zero words from leaving a zero state as it is.
_INCREMENT = 0x9E3779B9
# Start of the two lanes of a key: fractional bits of sqrt(2) and sqrt(3), so that the lanes are unrelated.
_LANE_SEEDS = (0x6A09E667, 0xBB67AE85)
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def mix32(words: Tensor) -> Tensor:
    """Scatter 32-bit words one-to-one over all 32-bit words, each input bit flipping about half of the output bits.

    The two-round multiply-xorshift function found by the search of C. Wellons' hash-prospector (public domain,
    github.com/skeeto/hash-prospector, issue 19, "[16 21f0aaad 15 735a2d97 15]", avalanche bias 0.107).

    Args:
        words: int64, any shape, values in 0..2^32 - 1.

    Returns:
        int64 of the same shape, values in 0..2^32 - 1.
    """
    words = words ^ (words >> 16)
    words.mul_(_MULTIPLIER_1).bitwise_and_(_WORD_MASK)
    words.bitwise_xor_(words >> 15)
    words.mul_(_MULTIPLIER_2).bitwise_and_(_WORD_MASK)
    return words.bitwise_xor_(words >> 15)


def position_keys(seed: Tensor, choice_index: Tensor, output_position: Tensor) -> Tensor:
    """Noise key of each position.

    Args:
        seed: [T] int64, all 64 bits count.
        choice_index: [T] int64, which of the choices of one API call; the low 32 bits count.
        output_position: [T] int64, 0-based index, in output tokens, of the token to choose; the low 32 bits count.

    Returns:
        [T, 2] int64 on the same device, two unrelated 32-bit words per position.
    """
    state = torch.stack([torch.full_like(seed, lane) for lane in _LANE_SEEDS], dim=-1)
    for word in (seed, seed >> _WORD_BITS, choice_index, output_position):
        state = mix32(((state + _INCREMENT) ^ word[:, None]) & _WORD_MASK)
    return state


def token_words(vocab_size: int, device: torch.device) -> Tensor:
    """A well mixed word for each token, [V] int64 in 1..2^32 - 1; the same for all positions."""
    return mix32(torch.arange(1, vocab_size + 1, device=device))


def gumbel_noise(keys: Tensor, words: Tensor) -> Tensor:
    """Standard Gumbel noise of every token at every position.

    With h = mix32(word * f mod 2^32 ^ key_1), f odd and made of key_0, and w = (h + 1/2) / 2^32, uniform in (0, 1), it
    is G = -log(E), E = -log(1 - w). Large G, which decides over rare tokens, comes from small w, where float32 is
    finest: values reach -log(2^-33) = 22.9. (Taken from 1 - w instead, they would end at 17.) The left tail ends at
    -2.8, below which G would be with a probability of 6e-8.

    Args:
        keys: [T, 2] int64, from `position_keys`.
        words: [V] int64, from `token_words`.

    Returns:
        [T, V] float32 on the device of the keys.
    """
    # One-to-one on words; two sums or xors instead would make pairs of keys equal or alike.
    factor = keys[:, :1] >> 1 | 1
    hashed = mix32((words * factor).bitwise_and_(_WORD_MASK).bitwise_xor_(keys[:, 1:]))
    negative_uniform = hashed.float().add_(0.5).mul_(-(2.0**-_WORD_BITS)).clamp_(min=-_LARGEST_BELOW_ONE)
    exponential = negative_uniform.log1p_().neg_()
    return exponential.log_().neg_()
