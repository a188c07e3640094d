"""`FakeQuantLinear`: a linear layer that trains at low bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grace.log_scale import init_log_scale
from grace.nn._keep_dtype import keep_dtype
from grace.ops.fake_quant import fake_quant, groups_of, quantize


class FakeQuantLinear(nn.Module):
    """``y = x · fake_quant(weight, log_scale)ᵀ + bias``, with weight and log-scales trained.

    The forward uses exactly the values that packing and export write: ``q·s`` with integer codes
    ``q`` and scales ``s = exp(log_scale)`` on the grid of ``scale_dtype``.

    Attributes:
        weight: Parameter [out_features, in_features]; the master weight, in any float dtype.
        log_scale: Parameter float32 [out_features, groups]; stays float32 whatever the model is
            cast to.
        bias: Parameter [out_features] or None.

    Raises:
        ValueError: bits outside 2–8, or a group size that neither divides in_features nor is −1.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 128,
        scale_dtype: torch.dtype | None = torch.bfloat16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an empty layer; `from_linear` makes one out of a layer with weights."""
        super().__init__()
        groups = groups_of("FakeQuantLinear", in_features, bits, group_size)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.scale_dtype = bits, group_size, scale_dtype
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        log_scale = torch.empty(out_features, groups, device=device, dtype=torch.float32)
        self.log_scale = nn.Parameter(log_scale)
        empty = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.register_parameter("bias", empty if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 128,
        scale_dtype: torch.dtype | None = torch.bfloat16,
        init: str = "mse",
    ) -> FakeQuantLinear:
        """A layer that holds the very Parameters of ``linear``, and log-scales found by ``init``.

        Args:
            linear: the layer to train at low bits; its weight and bias are shared, not copied.
            bits: 2 to 8.
            group_size: columns that share a scale; −1: a whole row.
            scale_dtype: grid of the scales; None keeps them float32.
            init: method of `grace.init_log_scale`.

        Raises:
            ValueError: as `init_log_scale`.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            bits=bits,
            group_size=group_size,
            scale_dtype=scale_dtype,
            device="meta",
        )
        layer.weight, layer.bias = cast(nn.Parameter, linear.weight), linear.bias
        found = init_log_scale(linear.weight, bits, group_size, init, scale_dtype=scale_dtype)
        layer.log_scale = nn.Parameter(found)
        layer.training = linear.training
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] → [..., out_features], in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.quantized_weight().to(x.dtype), bias)

    def quantized_weight(self) -> Tensor:
        """``q·s`` [out_features, in_features] in the weight's dtype, differentiable."""
        return fake_quant(
            self.weight,
            self.log_scale,
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    @torch.no_grad()
    def quantize(self) -> tuple[Tensor, Tensor]:
        """(codes int8 [out_features, in_features], scales [out_features, groups])."""
        return quantize(
            self.weight,
            self.log_scale,
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        scales = "float32" if self.scale_dtype is None else str(self.scale_dtype).split(".")[-1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"scale_dtype={scales}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantLinear:
        kept = keep_dtype(fn, self.log_scale, self.log_scale.grad)
        return cast(FakeQuantLinear, super()._apply(kept, recurse))
