"""Between a weight and its grid: codes times scales of `scale_dtype`.

A grid is described by its *steps*, a tensor of as many columns a group as the grid needs:
log-scales on the symmetric one, which kernels serve; log-scale and lowest code, side by side, on an
asymmetric one. Codes are not shifted: w/s rounded, from the lowest code of its group to 2^bits - 1
above it. The zero point that formats store is minus the lowest code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from grace.log_scale import init_log_scale
from grace.nn import FakeQuantLinear
from grace.ops.fake_quant import codes_of, groups_of, scales_from_log
from grace.ops.search_log_scale import log_of

_RATIOS = tuple(percent / 100 for percent in range(30, 101))  # of the range, as in `init_log_scale`
_CHUNK = 1 << 22  # weights in work at once, which bounds the memory


@dataclass(frozen=True)
class Grid:
    """What a weight is quantized to; here symmetric, as kernels serve it.

    Attributes:
        bits: 2 to 8.
        group_size: columns that share a scale; -1: a whole row.
        scale_dtype: grid of the scales; None: float32.
        init: how a scale is found, a method of `grace.init_log_scale`.
    """

    bits: int
    group_size: int
    scale_dtype: torch.dtype | None
    init: str = "mse"
    code_dtype: ClassVar[torch.dtype] = torch.int8

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1

    def columns(self, weight: Tensor) -> int:
        """Columns of a group of ``weight`` [N, K]."""
        return weight.shape[1] if self.group_size == -1 else self.group_size

    def find(self, weight: Tensor) -> Tensor:
        """Log-scales float32 [N, G] of ``weight`` [N, K], by `init`."""
        size = self.group_size
        return init_log_scale(weight, self.bits, size, self.init, scale_dtype=self.scale_dtype)

    def clipped(self, groups: Tensor, ratio: float) -> Tensor:
        """Steps of ``groups`` [N, G, g] whose range is a ratio of theirs."""
        return log_of(groups.abs().amax(-1) * (ratio / self.highest))

    def lows(self, log_scale: Tensor) -> Tensor:
        """The lowest code of every group, [N, G] float32."""
        return torch.full_like(log_scale, self.lowest)

    def scales(self, log_scale: Tensor) -> Tensor:
        """The scales that kernels multiply by, float32."""
        return scales_from_log(log_scale, self.scale_dtype)

    def nearest(self, weight: Tensor, log_scale: Tensor) -> Tensor:
        """``weight`` [N, K] rounded to the nearest code times scale, in its dtype."""
        scales = self.scales(log_scale).to(weight.dtype)
        return self.product(codes_of(weight, scales, self.bits), log_scale)

    def product(self, codes: Tensor, log_scale: Tensor) -> Tensor:
        """Codes [N, K] times their scales, in the codes' dtype."""
        return codes * spread(self.scales(log_scale).to(codes.dtype), codes.shape[1])


@dataclass(frozen=True)
class AsymmetricGrid(Grid):
    """Codes between the least and the largest weight of a group, zero among them.

    As GPTQ and AWQ have it as published. Nothing here serves it: it is for comparison. ``init`` is
    "mse", of least squared error among 71 from 0.3 to 1 times the range, or "absmax", the range.
    """

    code_dtype: ClassVar[torch.dtype] = torch.int16

    def find(self, weight: Tensor) -> Tensor:
        """Steps float32 [N, 2G] of ``weight`` [N, K], by `init`."""
        groups = groups_of("ptq", weight.shape[1], self.bits, self.group_size)
        if not bool(weight.isfinite().all()):
            raise ValueError("ptq: weight must be finite, got NaN or Inf")
        rows = max(1, _CHUNK // max(1, weight.shape[1]))
        return torch.cat([self._find(part, groups) for part in weight.float().split(rows)])

    def _find(self, weight: Tensor, groups: int) -> Tensor:
        grouped = weight.unflatten(1, (groups, -1))
        ratios = _RATIOS if self.init == "mse" else (1.0,)
        best = self.clipped(grouped, ratios[-1])
        least = torch.full_like(grouped[..., 0], torch.inf)
        for ratio in ratios:
            steps = self.clipped(grouped, ratio)
            error = (self.nearest(weight, steps) - weight).square().view_as(grouped).sum(-1)
            best = torch.where(each(error < least, steps), steps, best)
            least = torch.where(error < least, error, least)
        return best

    def clipped(self, groups: Tensor, ratio: float) -> Tensor:
        """As `Grid.clipped`, [N, 2G]."""
        low = groups.amin(-1).clamp_max(0) * ratio
        high = groups.amax(-1).clamp_min(0) * ratio
        log_scale = log_of((high - low) / (2**self.bits - 1))
        lowest = (low / scales_from_log(log_scale, self.scale_dtype)).round()
        return torch.stack([log_scale, lowest.clamp_(1 - 2**self.bits, 0)], -1).flatten(1)

    def lows(self, steps: Tensor) -> Tensor:
        """As `Grid.lows`."""
        return steps[:, 1::2]

    def scales(self, steps: Tensor) -> Tensor:
        """As `Grid.scales`."""
        return scales_from_log(steps[:, 0::2], self.scale_dtype)

    def nearest(self, weight: Tensor, steps: Tensor) -> Tensor:
        """As `Grid.nearest`."""
        scales, lows = (
            spread(of_groups.to(weight.dtype), weight.shape[1])
            for of_groups in (self.scales(steps), self.lows(steps))
        )
        codes = (weight / scales).round_()
        return codes.clamp_(min=lows, max=lows + (2**self.bits - 1)) * scales


def each(groups: Tensor, steps: Tensor) -> Tensor:
    """A mask [N, G] for all columns that steps have a group."""
    return groups.repeat_interleave(steps.shape[1] // groups.shape[1], dim=1)


def spread(scales: Tensor, columns: int) -> Tensor:
    """Scales [N, G] repeated over their groups to [N, columns]."""
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)


@torch.no_grad()
def install(linear: nn.Linear, quantized: Tensor, log_scale: Tensor, grid: Grid) -> FakeQuantLinear:
    """A layer whose fake-quantized weight is ``quantized``, in the very Parameters of ``linear``.

    Codes times scales, rounded to the weight's dtype, lie within a quarter of a scale of where they
    were: dividing them again gives the same codes, for every dtype and up to 8 bits.
    """
    linear.weight.copy_(quantized)
    layer = FakeQuantLinear(
        linear.in_features,
        linear.out_features,
        bias=False,
        bits=grid.bits,
        group_size=grid.group_size,
        scale_dtype=grid.scale_dtype,
        device="meta",
    )
    layer.weight, layer.bias = cast(nn.Parameter, linear.weight), linear.bias
    layer.log_scale = nn.Parameter(log_scale.to(linear.weight.device))
    layer.training = linear.training
    return layer
