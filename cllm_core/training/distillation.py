"""DistilledModel: turns a pack into the divergence of a student from its teacher (arXiv:1503.02531, arXiv:2306.13649).

Teacher and student read the same pack; each row of an answer learns what the teacher would say at its place, whoever
wrote the answer. The teacher is no part of the module: it is neither trained, saved nor sharded.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.training.losses import divergence_losses
from cllm_core.training.model import PackedModel, chunk_losses, chunks, hidden_of, logits_of, require_plain_head
from cllm_core.training.packing import PackLayout


class DistilledModel(PackedModel):
    """Wraps a student for training on packs without blocks.

    Args:
        causal_lm: the student, as PackedModel.
        teacher: frozen, of the same tokenizer and with attn_implementation="cllm_pack"; any size. It follows the packs
            to their device.
        divergence, temperature: see `divergence_losses`.
        chunk_rows: rows whose logits exist at once; one example's rows always do.

    Raises:
        ConfigError: one of the two computes logits in a way that the output layer alone does not.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        divergence: str,
        temperature: float = 1.0,
        chunk_rows: int = 256,
    ) -> None:
        super().__init__(causal_lm, consistency_weight=0.0, temperature=temperature, chunk_rows=chunk_rows)
        require_plain_head(teacher)
        self._teacher = (teacher,)  # in a tuple, so that torch does not register it
        self._divergence = divergence

    def forward(self, weight_totals: Tensor | None = None, **pack: Tensor) -> dict[str, Tensor]:
        """See PackedModel; ar_loss is the mean divergence."""
        layout = PackLayout(**pack)
        wanted = self._teacher_hidden(layout)
        hidden = self._hidden(layout)[layout.row_index]
        totals = self.weight_totals(pack) if weight_totals is None else weight_totals
        weights = torch.ones(len(hidden), device=hidden.device) / totals[0].clamp(min=1)
        head = self.causal_lm.get_output_embeddings()
        sums, losses = [], []
        for first, end in chunks(layout.chunk_ends.tolist(), self._chunk_rows):
            teacher_logits = logits_of(self._teacher[0].get_output_embeddings(), wanted[first:end])
            loss_of = partial(self._losses, teacher_logits=teacher_logits)
            total, chunk = chunk_losses(hidden[first:end], head, loss_of, weights[first:end])
            sums.append(total)
            losses.append(chunk)
        return {
            "loss": torch.stack(sums).sum(),
            "ar_loss": torch.cat(losses).mean(),
            "consistency_loss": torch.zeros(()),
            "num_ar": torch.tensor(len(hidden)),
            "num_consistency": torch.tensor(0),
        }

    def _losses(self, logits: Tensor, *, teacher_logits: Tensor) -> Tensor:
        """[R] divergences over the tokens that both know: models of one family pad their vocabularies differently."""
        num_tokens = min(logits.shape[-1], teacher_logits.shape[-1])
        return divergence_losses(
            logits[:, :num_tokens],
            base_logits=teacher_logits[:, :num_tokens],
            divergence=self._divergence,
            temperature=self._temperature,
        )

    @torch.no_grad()
    def _teacher_hidden(self, layout: PackLayout) -> Tensor:
        """[R, H of the teacher] its last hidden states at the rows."""
        teacher = self._teacher[0].to(layout.input_ids.device)  # type: ignore[arg-type]
        return hidden_of(teacher, layout)[layout.row_index]
