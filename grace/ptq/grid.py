"""Between a weight and the serving grid: symmetric codes times scales of `scale_dtype`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from grace.log_scale import init_log_scale
from grace.nn import FakeQuantLinear
from grace.ops.fake_quant import codes_of, scales_from_log


@dataclass(frozen=True)
class Grid:
    """What a weight is quantized to.

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
