"""Choosing tokens from logits, exactly and reproducibly. Called by the ModelRunner once per step.

A sampled token is argmax(processed logits / temperature + Gumbel noise), which has the distribution
softmax(processed logits / temperature) (Gumbel-max trick, arXiv:1411.0030). The noise is fixed by seed, choice,
output position and token, so choosing is a deterministic map and Jacobi iteration reaches the very sample that
autoregressive decoding draws, whatever the block length and the batch.
"""

import torch
from torch import Tensor

from cllm_core.backends.paged_model import SamplingKernels
from cllm_core.engine import processors
from cllm_core.engine.noise import gumbel_noise, token_words
from cllm_core.engine.sampling_batch import Draw, Penalties, SamplingBatch

# Logits drawn from at once: on a CPU about what stays in its cache, on a GPU what bounds temporary memory.
_CPU_CHUNK = 2**17
_DEVICE_CHUNK = 2**24

# Temporary memory of a logit that is drawn from. Noise takes three int64 beside the score, 28. Top-p should take most
# while CUDA sorts: scores, probabilities, sorted values and their int64 places, 20, and in the sort itself two arrays
# of 8-byte places, the sorted keys, and keys and places once more for the radix passes, 32. An estimate, rounded up:
# what the sort takes was not measured on a device.
_BYTES_PER_DRAWN_LOGIT = 56

# Tokens whose largest score is found before the one among them: divides nearly every vocabulary.
_ARGMAX_BLOCK = 128


def sample(logits: Tensor, batch: SamplingBatch, kernels: SamplingKernels | None = None) -> Tensor:
    """Choose one token per position.

    Args:
        logits: [T, V] float32, row after row as in `batch`; not changed. Grammar masks (-inf) may be in it already.
        batch: T positions.
        kernels: choose; None: tensor code does.

    Returns:
        [T] int64, on the device of the logits. Equal scores resolve to the lowest token id.

    Raises:
        ValueError: shapes do not fit the batch, or a bias or suppression names a token outside of the vocabulary.
    """
    _check(logits, batch)
    logits = _process(logits, batch)
    if batch.has_greedy or not batch.draws:
        tokens = largest(logits) if kernels is None else kernels.largest(logits)
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for group in batch.draws:
        drawn = _draw(logits, group) if kernels is None else _draw_by(kernels, logits, group)
        tokens.index_copy_(0, group.positions, drawn)
    return tokens


def drawing_bytes(num_positions: int, vocab_size: int) -> int:
    """Temporary memory, beside the logits, of random draws at so many positions on a CUDA device."""
    num_rows = min(num_positions, max(1, _DEVICE_CHUNK // vocab_size))
    return num_rows * vocab_size * _BYTES_PER_DRAWN_LOGIT


def largest(scores: Tensor) -> Tensor:
    """Index of the largest score of each row, the lowest of equal ones: argmax, by way of the largest of each block.

    On CPUs torch finds a maximum several times as fast as its place.

    Args:
        scores: [T, V] float.

    Returns:
        [T] int64.
    """
    if scores.device.type != "cpu" or scores.shape[-1] % _ARGMAX_BLOCK:
        return scores.argmax(-1)
    blocks = scores.view(len(scores), scores.shape[-1] // _ARGMAX_BLOCK, _ARGMAX_BLOCK)
    best = blocks.amax(-1).argmax(-1)
    within = blocks[torch.arange(len(scores)), best].argmax(-1)
    index: Tensor = best * _ARGMAX_BLOCK + within
    return index


def _check(logits: Tensor, batch: SamplingBatch) -> None:
    if len(logits) != batch.num_positions:
        raise ValueError(f"logits has {len(logits)} rows, the batch {batch.num_positions} positions: give one row each")
    if batch.max_token_id >= logits.shape[-1]:
        raise ValueError(f"token id {batch.max_token_id} is outside of the vocabulary of {logits.shape[-1]} tokens")


def _process(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What acts on greedy and random positions alike."""
    if batch.bias is not None:
        logits = processors.add_bias(logits, batch.bias.positions, batch.bias.token_ids, batch.bias.values)
    if batch.suppression is not None:
        logits = processors.suppress(logits, batch.suppression.positions, batch.suppression.token_ids)
    return logits if batch.penalties is None else _penalize(logits, batch.penalties)


def _penalize(logits: Tensor, penalties: Penalties) -> Tensor:
    """Apply repetition, then presence and frequency penalty to the tokens that have occurred."""
    places = (penalties.positions, penalties.token_ids)
    chosen = logits[places][:, None]
    chosen = processors.penalize_repetition(chosen, penalties.text_counts[:, None], penalties.repetition)
    output_counts = penalties.output_counts[:, None]
    chosen = processors.penalize_output(chosen, output_counts, penalties.presence, penalties.frequency)
    return logits.index_put(places, chosen[:, 0])


def _draw(logits: Tensor, group: Draw) -> Tensor:
    """Tokens [N] of a group's positions, drawn chunk by chunk."""
    chunk_size = _CPU_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK
    num_rows = max(1, chunk_size // logits.shape[-1])
    words = token_words(logits.shape[-1], logits.device)
    starts = range(0, len(group.positions), num_rows)
    return torch.cat([_draw_chunk(logits, group, slice(start, start + num_rows), words) for start in starts])


def _draw_by(kernels: SamplingKernels, logits: Tensor, group: Draw) -> Tensor:
    return kernels.draw(
        logits,
        positions=group.positions,
        keys=group.keys,
        temperature=group.temperature,
        top_k=group.top_k,
        top_p=group.top_p,
        min_p=group.min_p,
    )


def _draw_chunk(logits: Tensor, group: Draw, rows: slice, words: Tensor) -> Tensor:
    scores = processors.apply_temperature(logits.index_select(0, group.positions[rows]), group.temperature[rows])
    if group.top_k is not None:
        scores = processors.keep_top_k(scores, group.top_k[rows], group.max_top_k)
    if group.top_p is not None:
        scores = processors.keep_top_p(scores, group.top_p[rows])
    if group.min_p is not None:
        scores = processors.keep_min_p(scores, group.min_p[rows])
    return largest(scores.add_(gumbel_noise(group.keys[rows], words)))
