"""DraftChoice: for every running request, whose draft comes next - the model's own or one copied from known text.

The model's own draft is what it predicted behind the accepted tokens but did not confirm. A CLLM was trained to be
right there; a plain model predicted it from a wrong token and seldom is, while texts that repeat words of the prompt
are guessed well by copying. Which of the two a request needs shows while it runs: both drafts are kept until the next
tokens are accepted, and the one that would have been confirmed further, lately, is used. All of it stays on the device.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from cllm_core.config import MAX_BLOCK_LENGTH

_OWN, _COPIED = 0, 1
_NO_TOKEN = -1  # first token of a draft that there is none of
# Weight of a new observation: about the last ten windows count. 0.1 and 0.2 did equally well (docs/tries.md).
_RATE = 0.1
# Equal at first, where a tie goes to the model's own draft: a few windows of a plain model are enough to lower it.
_INITIAL_LENGTH = 1.0


class DraftChoice:
    """Tensors with one row per slot.

    Args:
        num_slots: requests that run together.
        device: where the tensors live.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._drafts = torch.full((num_slots, 2, MAX_BLOCK_LENGTH), _NO_TOKEN, dtype=torch.long, device=device)
        self._lengths = torch.full((num_slots, 2), _INITIAL_LENGTH, device=device)

    def forget(self, slots: Tensor) -> None:
        """Begin anew for requests that got a slot."""
        self._drafts[slots] = _NO_TOKEN
        self._lengths[slots] = _INITIAL_LENGTH

    def observe(self, slots: Tensor, accepted: Tensor, num_accepted: Tensor) -> None:
        """Learn how far each draft of the last `choose` would have been confirmed.

        Args:
            slots: [B] int64.
            accepted: [B, N] int64, the tokens that followed the text which the drafts were made for.
            num_accepted: [B] int64, how many of them are final; the others are ignored.
        """
        width = min(accepted.shape[1], MAX_BLOCK_LENGTH)
        is_final = torch.arange(width, device=slots.device) < num_accepted[:, None]
        drafts, lengths = self._drafts[slots], self._lengths[slots]
        agrees = (drafts[:, :, :width] == accepted[:, None, :width]) & is_final[:, None]
        seen = agrees.long().cumprod(dim=-1).sum(dim=-1)
        self._lengths[slots] = torch.where(
            drafts[:, :, 0] == _NO_TOKEN, lengths, torch.lerp(lengths, seen.float(), _RATE)
        )

    def choose(self, slots: Tensor, own: Tensor, copied: Tensor, *, is_found: Tensor, is_trusted: Tensor) -> Tensor:
        """The next drafts; both are remembered for `observe`.

        Args:
            slots: [B] int64.
            own: [B, K] int64, K < MAX_BLOCK_LENGTH, what the model predicted.
            copied: [B, K] int64.
            is_found: [B] bool, whether there was something to copy; else the row's own draft is taken.
            is_trusted: [B] bool, take what is copied whatever was seen so far.

        Returns:
            [B, K] int64.
        """
        num_tokens = own.shape[1]
        drafts = torch.stack([own, copied.where(is_found[:, None], _NO_TOKEN)], dim=1)
        # One column more ends both: behind it lie older, longer ones.
        self._drafts[slots, :, : num_tokens + 1] = pad(drafts, (0, 1), value=_NO_TOKEN)
        lengths = self._lengths[slots]
        is_better = is_found & (lengths[:, _COPIED] > lengths[:, _OWN])
        return copied.where((is_better | is_trusted)[:, None], own)
