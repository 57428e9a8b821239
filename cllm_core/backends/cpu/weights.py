"""PanelWeight: the weight of a linear layer as our own matrix products read it (kernels.h), as bfloat16 or in
groups of 8-bit numbers with a scale each.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cllm_core.backends.cpu.records import LinearRecord

PANEL = 32  # outputs side by side
INPUT_UNIT = 32  # inputs that a panel has a multiple of, as AMX multiplies so many at once
INT8_GROUP = 64  # inputs with one scale

_LARGEST = 127
_NUMBER_BYTES = INT8_GROUP * PANEL


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A weight [out, in], `out` a multiple of PANEL, and a bias.

    Attributes:
        panels: [out / PANEL, in / 2, PANEL, 2] bfloat16, `in` rounded up to INPUT_UNIT by zeros; or
            [out / PANEL, in / INT8_GROUP, bytes of a group] uint8, the group being weight_group of kernels.h.
        num_in: inputs.
        bias: [out] float32.
    """

    panels: Tensor
    num_in: int
    bias: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> "PanelWeight":
        """From [out, in] bfloat16, `in` even, and [out]."""
        num_in = weight.shape[1]
        padded = F.pad(weight, (0, -num_in % INPUT_UNIT))
        panels = padded.unflatten(0, (-1, PANEL)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
        return cls(panels, num_in, None if bias is None else bias.float())

    def to_int8(self) -> "PanelWeight":
        """The same weight in 8 bits, rounded to nearest; `in` is a multiple of INT8_GROUP.

        Every INT8_GROUP inputs of an output have a scale of their own: the largest of them over 127.
        """
        groups = self.panels.unflatten(1, (-1, INT8_GROUP // 2)).transpose(2, 3).flatten(3).float()
        scales = (groups.abs().amax(dim=-1) / _LARGEST).bfloat16()  # [panels, groups, PANEL]
        steps = scales.float().clamp_min(torch.finfo(torch.bfloat16).tiny)[..., None]
        numbers = (groups / steps).round_().clamp_(-_LARGEST, _LARGEST).char()
        fours = numbers.unflatten(-1, (-1, 4)).transpose(2, 3).flatten(2).view(torch.uint8)
        return PanelWeight(torch.cat((fours, scales.view(torch.uint8)), dim=-1), self.num_in, self.bias)

    @property
    def is_int8(self) -> bool:
        """Whether the weight is held in 8 bits."""
        return self.panels.dtype == torch.uint8

    @property
    def num_out(self) -> int:
        """Outputs."""
        return PANEL * self.panels.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of the panels."""
        return self.panels.nbytes

    @property
    def record(self) -> LinearRecord:
        """What the kernels read; keep the weight alive beside it."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return LinearRecord(self.panels.data_ptr(), bias, self.num_in, self.num_out, self.is_int8)

    def rows(self, index: Tensor) -> Tensor:
        """[..., in] bfloat16: the weights of the outputs index [...] int64."""
        panel, place = index // PANEL, index % PANEL
        if not self.is_int8:
            weights: Tensor = self.panels[panel, :, place]
            return weights.flatten(-2)[..., : self.num_in]
        fours = self.panels[..., :_NUMBER_BYTES].view(torch.int8).unflatten(-1, (-1, PANEL, 4))
        numbers: Tensor = fours[panel, :, :, place]
        scales: Tensor = self.panels[..., _NUMBER_BYTES:].view(torch.bfloat16)[panel, :, place]
        return (numbers.flatten(-2).float() * scales.float()[..., None]).flatten(-2).bfloat16()


def pad_outputs(weight: Tensor) -> Tensor:
    """[out, in] with rows of zeros behind, up to a multiple of PANEL."""
    return F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
