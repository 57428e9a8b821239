"""PackedModel: a causal language model that turns one pack into its losses.

The backbone runs once over the pack; the output layer, which costs as much as many layers where the vocabulary is
large, runs only on rows that have something to predict, a chunk of them at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from cllm_core.errors import ConfigError
from cllm_core.training.attention import PackAttention
from cllm_core.training.losses import row_losses
from cllm_core.training.packing import PackedExample, PackLayout, build_layout, without_blocks
from cllm_core.training.unrolling import advance_drafts, count_blocks, learning_depths

LossOfLogits = Callable[[Tensor], Tensor]

_NUM_PROBED = 8
_LOGITS_TOLERANCE = 0.05  # relative; bf16 rounds at 0.004


class PackedModel(nn.Module):
    """Wraps a model for training on packs.

    Args:
        causal_lm: transformers model with attn_implementation="cllm_pack", LoRA layers included where there are any.
        ar_weight, consistency_weight: factors of the mean AR loss and the mean consistency loss.
        depth_decay: weight of a draft token over that of the one before it, from the first wrong one on.
        soft: consistency targets are distributions (see `losses`), else tokens.
        temperature: of targets that are distributions.
        base: switches the adapter off while its context lasts; where given, the model without it makes the targets of
            both losses.
        unroll: Jacobi iterations that `unrolled` takes blocks through, each block a random number of them up to this.
        chunk_rows: rows whose logits exist at once; one example's rows always do.

    Raises:
        ConfigError: the model computes logits in a way that the output layer alone does not.
    """

    accepts_loss_kwargs = False  # keeps the Trainer's own count of labels, which packs do not have, out of the loss

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        ar_weight: float = 1.0,
        consistency_weight: float = 1.0,
        depth_decay: float = 1.0,
        soft: bool = True,
        temperature: float = 1.0,
        base: Callable[[], AbstractContextManager[None]] | None = None,
        unroll: int = 0,
        chunk_rows: int = 256,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._ar_weight = ar_weight
        self._consistency_weight = consistency_weight
        self._depth_decay = depth_decay
        self._soft = soft
        self._temperature = temperature
        self._base = base
        self._unroll = unroll
        self._chunk_rows = chunk_rows
        self._no_split_modules = causal_lm._no_split_modules  # FSDP wraps these layers
        require_plain_head(causal_lm)

    @property
    def config(self) -> Any:  # whatever configuration class the architecture has
        """Of the model inside; the Trainer and its reports ask for it."""
        return self.causal_lm.config

    def forward(self, weight_totals: Tensor | None = None, **pack: Tensor) -> dict[str, Tensor]:
        """Losses of one pack.

        Args:
            weight_totals: [2] float32, `weight_totals` of all packs whose losses are summed, so that the sum is a mean
                over their tokens; None: of this pack alone.
            pack: fields of PackLayout, on the model's device.

        Returns:
            loss: the weighted sum to minimise. ar_loss, consistency_loss: the means over this pack's rows, without
            gradient; 0 where it has no such rows. num_ar, num_consistency: how many rows those are.
        """
        layout = PackLayout(**pack)
        base_hidden = self._base_hidden(layout)
        hidden = self._hidden(layout)
        is_clean = layout.teacher_rows < 0
        depths = learning_depths(layout)
        totals = self.weight_totals(pack) if weight_totals is None else weight_totals
        weights = self._row_weights(is_clean, depths, totals)
        head = self.causal_lm.get_output_embeddings()
        sums, losses, num_clean = [], [], 0
        for first, end in chunks(layout.chunk_ends.tolist(), self._chunk_rows):
            teachers = layout.teacher_rows[first:end]
            first_clean, num_clean = num_clean, num_clean + int(is_clean[first:end].sum())
            loss_of = partial(
                row_losses,
                target_ids=layout.target_ids[first:end],
                teacher_rows=torch.where(teachers >= 0, teachers - first, teachers),
                soft=self._soft,
                temperature=self._temperature,
                base_logits=None if base_hidden is None else logits_of(head, base_hidden[first_clean:num_clean]),
            )
            total, chunk = chunk_losses(hidden[layout.row_index[first:end]], head, loss_of, weights[first:end])
            sums.append(total)
            losses.append(chunk)
        per_row = torch.cat(losses)
        return {
            "loss": torch.stack(sums).sum(),
            "ar_loss": _mean(per_row[is_clean]),
            "consistency_loss": _mean(per_row[depths > 0]),
            "num_ar": is_clean.sum(),
            "num_consistency": (depths > 0).sum(),
        }

    def weight_totals(self, pack: Mapping[str, Tensor]) -> Tensor:
        """[2] float32: answer tokens of a pack, and the weights of its draft tokens added up."""
        layout = PackLayout(**pack)
        return torch.stack([(layout.teacher_rows < 0).sum(), self._depth_weights(learning_depths(layout)).sum()])

    @torch.no_grad()
    def unrolled(self, pack: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The pack whose blocks the model has gone on with itself.

        Args:
            pack: fields of PackLayout, on the model's device.
            generator: on the CPU; draws how far each block goes.
        """
        layout = PackLayout(**pack)
        num_iterations = torch.randint(self._unroll + 1, (count_blocks(layout),), generator=generator)
        num_iterations = num_iterations.to(layout.input_ids.device)
        for iteration in range(self._unroll):
            layout = advance_drafts(layout, self._predicted(layout), num_iterations > iteration)
        return layout.as_dict()

    def _hidden(self, layout: PackLayout) -> Tensor:
        """[T, H] last hidden states."""
        return hidden_of(self.causal_lm, layout)

    @torch.no_grad()
    def _base_hidden(self, layout: PackLayout) -> Tensor | None:
        """[C, H] last hidden states of the base at the clean rows; None where it makes no targets."""
        if self._base is None:
            return None
        clean = without_blocks(layout)
        with self._base():
            return self._hidden(clean)[clean.row_index]

    def _predicted(self, layout: PackLayout) -> Tensor:
        """[R] likeliest token of each row."""
        head = self.causal_lm.get_output_embeddings()
        rows = self._hidden(layout)[layout.row_index]
        return torch.cat([head(chunk).argmax(dim=-1) for chunk in rows.split(self._chunk_rows)])

    def _row_weights(self, is_clean: Tensor, depths: Tensor, totals: Tensor) -> Tensor:
        num_clean, depth_weight = totals.clamp(min=1)
        weights: Tensor = self._ar_weight / num_clean * is_clean
        weights += self._consistency_weight / depth_weight * self._depth_weights(depths)
        return weights

    def _depth_weights(self, depths: Tensor) -> Tensor:
        """[R] float32, of the rows' consistency losses."""
        return torch.where(depths > 0, self._depth_decay ** (depths - 1).float(), 0.0)


def hidden_of(causal_lm: PreTrainedModel, layout: PackLayout) -> Tensor:
    """[T, H] last hidden states of a pack."""
    out = causal_lm.get_decoder()(
        input_ids=layout.input_ids[None],
        position_ids=layout.position_ids[None],
        use_cache=False,
        pack=PackAttention(layout),
    )
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


@torch.no_grad()
def logits_of(head: nn.Module, hidden: Tensor) -> Tensor:
    """[R, V] of hidden states [R, H], without gradient."""
    logits: Tensor = head(hidden)
    return logits


def chunks(ends: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `size` rows that end where an example does."""
    first = previous = 0
    for end in ends:
        if previous > first and end - first > size:
            yield first, previous
            first = previous
        previous = end
    yield first, previous


def chunk_losses(hidden: Tensor, head: nn.Module, loss_of: LossOfLogits, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted sum, with gradient; [R] losses, without) of one chunk of rows.

    Args:
        hidden: [R, H].
        head: output layer.
        loss_of: losses [R] of logits [R, V].
        weights: [R].
    """
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    result: tuple[Tensor, Tensor] = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, loss_of, weights, *parameters
    )
    return result


class _HeadLoss(torch.autograd.Function):
    """Output layer and loss whose gradient is computed at once, so that no logits outlive the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, loss_of: LossOfLogits, weights: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_()
            losses = loss_of(head(inputs))
            total = (losses * weights).sum()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*torch.autograd.grad(total, [inputs, *parameters]))
        losses = losses.detach()
        ctx.mark_non_differentiable(losses)
        return total.detach(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = (grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, None, None, None, *parameters


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.new_zeros(())


@torch.no_grad()
def require_plain_head(causal_lm: PreTrainedModel) -> None:
    """Raise ConfigError for a model that scales or caps its logits after the output layer, which packs leave out."""
    layout = build_layout([[PackedExample(prompt_ids=tuple(range(_NUM_PROBED)), output_ids=(0,))]])
    inputs = {
        "input_ids": layout.input_ids[None].to(causal_lm.device),
        "use_cache": False,
        "pack": PackAttention(layout),
    }
    # as in training: the adapter on a bfloat16 model is in float32
    with torch.autocast(causal_lm.device.type, torch.bfloat16, enabled=causal_lm.dtype == torch.bfloat16):
        whole = causal_lm(**inputs).logits
        hidden = causal_lm.get_decoder()(**inputs).last_hidden_state
        parts = causal_lm.get_output_embeddings()(hidden)
    if not torch.allclose(whole.float(), parts.float(), rtol=_LOGITS_TOLERANCE, atol=_LOGITS_TOLERANCE):
        raise ConfigError(
            f"{type(causal_lm).__name__} changes its logits after the output layer: packed training does not support it"
        )
