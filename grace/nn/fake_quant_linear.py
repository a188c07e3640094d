"""`FakeQuantLinear`: a linear layer that trains at low bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grace.log_scale import init_log_scale
from grace.nn._keep_dtype import keep_dtype
from grace.ops.dequant_gemm import dequant_gemm
from grace.ops.fake_quant import fake_quant, groups_of, quantize
from grace.ops.quantize_pack import quantize_pack

Product = Literal["dense", "packed"]


class FakeQuantLinear(nn.Module):
    """``y = x · fake_quant(weight, log_scale)ᵀ + bias``, with weight and log-scales trained.

    The forward uses exactly the values that packing and export write: ``q·s`` with integer codes
    ``q`` and scales ``s = exp(log_scale)`` on the grid of ``scale_dtype``.

    There are two ways to the product. ``"dense"`` makes ``q·s`` in the weight's dtype and
    multiplies by it. ``"packed"`` packs the codes and calls the kernel of the deployed layer,
    `grace.ops.dequant_gemm`: the output is that of `PackedLinear` bit for bit, and ``q·s`` is in
    memory only during the backward, which makes it again. Gradients follow the same formulas.

    Attributes:
        weight: Parameter [out_features, in_features]; the master weight, in any float dtype.
        log_scale: Parameter float32 [out_features, groups]; stays float32 whatever the model is
            cast to.
        bias: Parameter [out_features] or None.
        product: "dense" or "packed"; may be set at any time.

    Raises:
        ValueError: bits outside 2–8, a group size that neither divides in_features nor is −1, a
            product of another name, or "packed" with bits other than 4 and 8.
    """

    bias: nn.Parameter | None
    # Set by grace.nn.quantize_ahead: q·s made already, and whether it outlives the forward.
    ahead: Tensor | None = None
    held: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 128,
        scale_dtype: torch.dtype | None = torch.bfloat16,
        product: Product = "dense",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an empty layer; `from_linear` makes one out of a layer with weights."""
        super().__init__()
        groups = groups_of("FakeQuantLinear", in_features, bits, group_size)
        _check_product(product, bits)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.scale_dtype = bits, group_size, scale_dtype
        self.product = product
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
        product: Product = "dense",
    ) -> FakeQuantLinear:
        """A layer that holds the very Parameters of ``linear``, and log-scales found by ``init``.

        Args:
            linear: the layer to train at low bits; its weight and bias are shared, not copied.
            bits: 2 to 8.
            group_size: columns that share a scale; −1: a whole row.
            scale_dtype: grid of the scales; None keeps them float32.
            init: method of `grace.init_log_scale`.
            product: "dense" or "packed", how the forward multiplies.

        Raises:
            ValueError: as `init_log_scale` and the class.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            bits=bits,
            group_size=group_size,
            scale_dtype=scale_dtype,
            product=product,
            device="meta",
        )
        layer.weight, layer.bias = cast(nn.Parameter, linear.weight), linear.bias
        found = init_log_scale(linear.weight, bits, group_size, init, scale_dtype=scale_dtype)
        layer.log_scale = nn.Parameter(found)
        layer.training = linear.training
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] → [..., out_features], in the dtype of ``x``.

        With ``product="packed"`` under autocast: in autocast's dtype, like `F.linear`. On a GPU
        that product is of float16 and bfloat16 only (ValueError).
        """
        if self.product == "packed":
            return self._packed_product(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.quantized_weight() if self.ahead is None else self.ahead
        if not torch.is_autocast_enabled(x.device.type):  # else F.linear casts
            weight = weight.to(x.dtype)
        return F.linear(x, weight, bias)

    def _packed_product(self, x: Tensor) -> Tensor:
        _check_product(self.product, self.bits)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        settings = (self.bits, self.group_size, self.scale_dtype)
        return _PackedProduct.apply(x, self.weight, self.log_scale, bias, *settings)

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
            f"scale_dtype={scales}" + (", product=packed" if self.product == "packed" else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantLinear:
        kept = keep_dtype(fn, self.log_scale, self.log_scale.grad)
        return cast(FakeQuantLinear, super()._apply(kept, recurse))


def _check_product(product: str, bits: int) -> None:
    if product not in get_args(Product):
        raise ValueError(f"FakeQuantLinear: product must be dense or packed, got {product}")
    if product == "packed" and bits not in (4, 8):
        raise ValueError(f"FakeQuantLinear: bits must be 4 or 8 with a packed product, got {bits}")


class _PackedProduct(torch.autograd.Function):
    """x · ŵᵀ + bias by the deployed layer's kernel; nothing is kept but x and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        log_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        scale_dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, log_scale)
        ctx.settings = bits, group_size, scale_dtype
        qweight, scales = quantize_pack(
            weight, log_scale, bits=bits, group_size=group_size, scale_dtype=scale_dtype
        )
        return dequant_gemm(
            x,
            qweight,
            scales,
            bias,
            bits=bits,
            group_size=group_size,
            out_features=weight.shape[0],
            settled=False,  # quantize_pack may still be writing it
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, log_scale = ctx.saved_tensors
        for_x, for_weight, for_scale, for_bias = ctx.needs_input_grad[:4]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_log_scale = None
        if for_x:
            made = torch.ops.grace.fake_quant(
                weight.contiguous(), log_scale.contiguous(), *ctx.settings
            )
            grad_x = (rows @ made.to(grad.dtype)).view(x.shape)
        if for_weight or for_scale:
            product = rows.t() @ x.reshape(-1, x.shape[-1])
            grad_weight, grad_log_scale = torch.ops.grace.fake_quant_backward(
                product.to(weight.dtype), weight.contiguous(), log_scale.contiguous(), *ctx.settings
            )
        grad_bias = rows.sum(0) if for_bias else None
        return grad_x, grad_weight, grad_log_scale, grad_bias, None, None, None
