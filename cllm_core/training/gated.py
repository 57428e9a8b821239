"""GatedModel: turns a pack into the loss of a gated adapter, which foresees what the base will say (arXiv:2609.04010).

The base alone reads prompts and answers; blocks of random tokens stand in for what is not known yet, and the adapter
acts on these alone. Row i of a block sees the text before the block and the noise before it, and learns the
distribution that the base has at the same place. ::

    answer      y0  y1  y2  y3  y4  y5        base, no gradient
    block               n0  n1  n2            at the places of y2 y3 y4; learn what follows y2, y3 and y4

No weight that learns acts on the text, so it is computed once, without gradient, and its keys and values are constants
of the blocks' pass. Every place of a text can have a block: the text is paid for once.
"""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.training.attention import BlockAttention, TextAttention
from cllm_core.training.config import NoiseConfig
from cllm_core.training.examples import NoisyBlock, Trajectory
from cllm_core.training.losses import divergence_losses
from cllm_core.training.model import PackedModel, chunk_losses, chunks, logits_of
from cllm_core.training.noise import pick
from cllm_core.training.packing import PackLayout, without_blocks


class GatedModel(PackedModel):
    """Wraps a model and its adapter for training on packs with blocks of noise.

    Args:
        causal_lm: as PackedModel.
        base: switches the adapter off while its context lasts.
        depth_decay: weight of a row over that of the one before it.
        divergence: see `divergence_losses`.
        chunk_rows: rows whose logits exist at once; one example's rows always do.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        base: Callable[[], AbstractContextManager[None]],
        depth_decay: float,
        divergence: str,
        chunk_rows: int = 256,
    ) -> None:
        super().__init__(causal_lm, base=base, depth_decay=depth_decay, chunk_rows=chunk_rows)
        self._divergence = divergence

    def forward(self, weight_totals: Tensor | None = None, **pack: Tensor) -> dict[str, Tensor]:
        """See PackedModel; the answers themselves have no loss."""
        layout = PackLayout(**pack)
        per_row = torch.zeros(0)
        loss = sum((p.sum() * 0 for p in self.parameters() if p.requires_grad), start=torch.zeros(()))
        num_rows = int((layout.teacher_rows >= 0).sum())
        if num_rows:
            totals = self.weight_totals(pack) if weight_totals is None else weight_totals
            loss, per_row = self._block_losses(layout, totals[1])
        return {
            "loss": loss,
            "ar_loss": torch.zeros(()),
            "consistency_loss": per_row.mean() if num_rows else torch.zeros(()),
            "num_ar": torch.tensor(0),
            "num_consistency": torch.tensor(num_rows),
        }

    def _block_losses(self, layout: PackLayout, total_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted sum, with gradient; [rows of blocks] losses, without)."""
        text_hidden, attention = self._read_text(layout)
        is_noise = layout.teacher_rows >= 0
        rows = layout.row_index[is_noise]
        hidden = self._run(layout.input_ids[rows], layout.position_ids[rows], attention)
        weights = self._depth_decay ** (block_depths(layout) - 1).float() / total_weight.clamp(min=1)
        # The text's hidden states are those of the rows that are not noise, in their order.
        teachers = (~is_noise).cumsum(dim=0)[layout.teacher_rows[is_noise]] - 1
        head = self.causal_lm.get_output_embeddings()
        sums, losses = [], []
        ends = is_noise.cumsum(dim=0)[layout.chunk_ends - 1]
        for first, end in chunks(ends.tolist(), self._chunk_rows):
            if first == end:
                continue
            wanted = logits_of(head, text_hidden[teachers[first:end]])
            loss_of = partial(divergence_losses, base_logits=wanted, divergence=self._divergence)
            total, chunk = chunk_losses(hidden[first:end], head, loss_of, weights[first:end])
            sums.append(total)
            losses.append(chunk)
        return torch.stack(sums).sum(), torch.cat(losses)

    def weight_totals(self, pack: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """See PackedModel."""
        depths = block_depths(PackLayout(**pack))
        total = (self._depth_decay ** (depths - 1).float()).sum()
        return torch.stack([torch.zeros_like(total), total])

    @torch.no_grad()
    def _read_text(self, layout: PackLayout) -> tuple[Tensor, BlockAttention]:
        """[C, H] last hidden states of the base at the clean rows, and the attention of the blocks to the text."""
        text = without_blocks(layout)
        attention = TextAttention(text)
        assert self._base is not None
        with self._base():
            hidden = self._run(text.input_ids, text.position_ids, attention)
        return hidden[text.row_index], BlockAttention(layout, attention)

    def _run(self, input_ids: Tensor, positions: Tensor, attention: TextAttention | BlockAttention) -> Tensor:
        out = self.causal_lm.get_decoder()(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, pack=attention
        )
        hidden: Tensor = out.last_hidden_state
        return hidden[0]


def block_depths(layout: PackLayout) -> Tensor:
    """[rows of blocks] 1 for the first row of its block, then counted up."""
    rows = layout.row_index[layout.teacher_rows >= 0]
    return layout.position_ids[rows] - layout.starts[rows] + 1


def noise_blocks(
    trajectory: Trajectory, config: NoiseConfig, noise_ids: range, rng: random.Random
) -> tuple[NoisyBlock, ...]:
    """Blocks of random tokens for one example, at most `blocks_per_example`, at places of their own in ascending order.

    Args:
        trajectory: the example.
        config: `block_length` n makes blocks of n - 1 tokens.
        noise_ids: what noise is drawn from, uniformly.
        rng: all is drawn from it.
    """
    output_ids = trajectory.output_ids
    num_places = len(output_ids) - 1
    num_wanted = min(config.blocks_per_example, num_places)
    starts = sorted({pick(num_places, index, num_wanted, rng) for index in range(num_wanted)})
    blocks = []
    for start in starts:
        length = min(config.block_length - 1, num_places - start)
        noise = tuple(rng.choices(noise_ids, k=length))
        blocks.append(NoisyBlock(start, noise, output_ids[start + 1 : start + 1 + length]))
    return tuple(blocks)
