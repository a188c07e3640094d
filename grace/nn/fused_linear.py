"""`FusedLinear`: several packed linears of one input as one weight.

`grace.nn.fuse` makes these, and what stands in the places of the layers, out of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grace.nn._keep_dtype import keep_dtype
from grace.nn.packed_linear import PackedLinear
from grace.ops.dequant_gemm import dequant_gemm
from grace.packing import TILE, deinterleave, interleave, pack, unpack

_CHUNK = 1 << 22  # codes of a layer that are in work at once


class FusedLinear(nn.Module):
    """The weights of several `PackedLinear` that take the same input, multiplied in one call.

    Without ``swiglu`` the layers' rows lie behind each other, and so do their results. With it the
    two layers are a gate and an up projection, interleaved (`grace.packing.interleave`), and the
    result is ``silu(gate) ⊙ up``.

    A state dict holds nothing of this module: the layers' tensors are in it as ever, by way of the
    `PackedPart` that stands where each of them stood.

    Attributes:
        sizes: out_features of each layer.
        hooks: those that call `share` and `stop_sharing`.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[PackedLinear], *, swiglu: bool = False) -> None:
        """Packs the weights of ``layers`` together; `grace.nn.fuse` knows which belong so."""
        super().__init__()
        first = layers[0]
        self.in_features, self.bits, self.group_size = (
            first.in_features,
            first.bits,
            first.group_size,
        )
        self.sizes = [layer.out_features for layer in layers]
        self.out_features, self.swiglu = sum(self.sizes), swiglu
        self.biased = [layer.bias is not None for layer in layers]
        self._set(layers)
        self.hooks: tuple[RemovableHandle, ...] = ()
        self._sharing = False
        # x, its version, the product, and how many layers have yet to take their part of it
        self._shared: tuple[Tensor, int | None, Tensor, int] | None = None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] → [..., out_features], or half as many with ``swiglu``."""
        return self._product(x, self.swiglu)

    def part(self, x: Tensor, index: int) -> Tensor:
        """What layer ``index`` makes of ``x``: a view of the product of all layers.

        Between `share` and `stop_sharing` that product serves every layer that is called with the
        very tensor it was made of, unless that was written to. In all other cases a layer computes
        a product of its own. (Inference tensors do not tell of writes: a forward that changes its
        input between its projections, in inference mode, is not one to fuse.)
        """
        if self.swiglu:
            return deinterleave(self._product(x, swiglu=False))[index]
        begin = sum(self.sizes[:index])
        return self._shared_product(x)[..., begin : begin + self.sizes[index]]

    def share(self, *_: object) -> None:
        """From here on layers may share a product (a forward pre-hook)."""
        self._sharing, self._shared = True, None

    def stop_sharing(self, *_: object) -> None:
        """From here on nothing is kept (a forward hook)."""
        self._sharing, self._shared = False, None

    def unpack(self, index: int) -> tuple[Tensor, Tensor]:
        """(codes, scales) of layer ``index``, exactly."""
        if self.swiglu:
            codes, scales = _unpack_rows(self, 0, self.out_features)
            return _part_of_pair(codes, index), _part_of_pair(scales, index)
        begin = sum(self.sizes[:index])
        return _unpack_rows(self, begin, begin + self.sizes[index])

    def bias_of(self, index: int) -> Tensor | None:
        """The bias of layer ``index``, or None."""
        if self.bias is None or not self.biased[index]:
            return None
        if self.swiglu:
            return _part_of_pair(self.bias, index)
        return self.bias.split(self.sizes)[index]

    def layer(self, index: int) -> PackedLinear:
        """Layer ``index`` with a weight and a bias of its own."""
        bias = self.bias_of(index)
        own = None if bias is None else bias.clone()
        layer = PackedLinear.from_codes(*self.unpack(index), own, self.bits, self.group_size)
        return layer.train(self.training)

    def replace(self, index: int, layer: PackedLinear) -> None:
        """Gives layer ``index`` the weight and the bias of ``layer``."""
        self._set([layer if i == index else self.layer(i) for i in range(len(self.sizes))])

    def extra_repr(self) -> str:
        """What `print(model)` shows of the module."""
        return (
            f"in_features={self.in_features}, out_features={'+'.join(map(str, self.sizes))}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"swiglu={self.swiglu}"
        )

    def _product(self, x: Tensor, swiglu: bool) -> Tensor:
        if x.shape[-1] != self.in_features:  # with one group a row the op knows K up to a tile
            raise ValueError(
                f"FusedLinear: x must have {self.in_features} features, got {x.shape[-1]}"
            )
        return dequant_gemm(
            x,
            self.qweight,
            self.scales,
            None if self.bias is None else self.bias.to(x.dtype),
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            swiglu=swiglu,
        )

    def _shared_product(self, x: Tensor) -> Tensor:
        shared = self._shared  # read once: another thread may put its own there
        if shared is not None and shared[0] is x and shared[1] == _version(x):
            product, left = shared[2], shared[3] - 1
        else:
            product, left = self._product(x, swiglu=False), len(self.sizes) - 1
        if self._sharing:
            self._shared = (x, _version(x), product, left) if left else None
        return product

    @torch.no_grad()
    def _set(self, layers: Sequence[PackedLinear]) -> None:
        qweights, scales = zip(*(_interleaved if self.swiglu else _stacked)(layers), strict=True)
        self.register_buffer("qweight", torch.cat(qweights), persistent=False)
        self.register_buffer("scales", torch.cat(scales, dim=1), persistent=False)
        self.register_buffer("bias", self._bias_of_all(layers), persistent=False)

    def _bias_of_all(self, layers: Sequence[PackedLinear]) -> Tensor | None:
        there = next((layer.bias for layer in layers if layer.bias is not None), None)
        if there is None:
            return None
        biases = [
            there.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        return interleave(*biases) if self.swiglu else torch.cat(biases)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinear:
        return cast(FusedLinear, super()._apply(keep_dtype(fn, self.scales), recurse))


class PackedPart(PackedLinear):
    """One layer of a `FusedLinear`, in the place and under the name that it had by itself.

    It is called, unpacked, saved and loaded as the `PackedLinear` that it was; only the weight is
    elsewhere, so that there is one copy.
    """

    def __init__(self, fused: FusedLinear, index: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = fused.in_features, fused.sizes[index]
        self.bits, self.group_size = fused.bits, fused.group_size
        self.index = index
        self._fused = (fused,)  # in a tuple: it is a submodule of the layers' owner
        self.train(fused.training)

    @property
    def fused(self) -> FusedLinear:
        """Where the weight is."""
        return self._fused[0]

    @property
    def is_packed(self) -> bool:
        """Always."""
        return True

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """[out_features] or None, out of the bias of all layers."""
        return self.fused.bias_of(self.index)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` [..., in_features] → [..., out_features]: a view, in the dtype of ``x``."""
        part = self.fused.part(x, self.index)
        return part if residual is None else part + residual

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(codes int8 [out_features, in_features], scales [out_features, groups]), exactly."""
        return self.fused.unpack(self.index)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``codes · scales`` [out_features, in_features]: exact in float32, then rounded once."""
        codes, scales = self.unpack()
        groups = codes.float().unflatten(1, (scales.shape[1], -1))
        return (groups * scales.float().unsqueeze(-1)).flatten(1).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedPart:
        return cast(PackedPart, nn.Module._apply(self, fn, recurse))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach().clone()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        layer = self.fused.layer(self.index)
        layer._load_from_state_dict(state_dict, prefix, *rest, **named)
        self.fused.replace(self.index, layer)


def _version(x: Tensor) -> int | None:
    """Grows when ``x`` is written to; inference tensors do not count, nor do traced ones."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _stacked(layers: Sequence[PackedLinear]) -> list[tuple[Tensor, Tensor]]:
    """Packed rows of all layers, behind each other."""
    if all(layer.out_features % TILE == 0 for layer in layers[:-1]):
        return [(layer.qweight, layer.scales) for layer in layers]
    codes, scales = zip(*(layer.unpack() for layer in layers), strict=True)
    return [pack(torch.cat(codes), torch.cat(scales), layers[0].bits)]


def _interleaved(layers: Sequence[PackedLinear]) -> list[tuple[Tensor, Tensor]]:
    """Packed rows of a gate and an up projection, in blocks of whole tiles."""
    gate, up = layers
    rows = max(1, _CHUNK // (gate.in_features * TILE)) * TILE
    packed = []
    for begin in range(0, gate.out_features, rows):
        end = min(begin + rows, gate.out_features)
        pairs = zip(_unpack_rows(gate, begin, end), _unpack_rows(up, begin, end), strict=True)
        codes, scales = (interleave(*pair) for pair in pairs)
        packed.append(pack(codes, scales, gate.bits))
    return packed


def _unpack_rows(layer: PackedLinear | FusedLinear, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of some rows; nothing but their tiles is unpacked."""
    first, last = begin // TILE, -(-end // TILE)
    codes, scales = unpack(
        layer.qweight[first:last],
        layer.scales[:, first * TILE : last * TILE],
        layer.bits,
        group_size=layer.group_size,
        in_features=layer.in_features,
        out_features=min(last * TILE, layer.out_features) - first * TILE,
    )
    inside = slice(begin - first * TILE, end - first * TILE)
    return codes[inside], scales[inside]


def _part_of_pair(rows: Tensor, index: int) -> Tensor:
    """Undoes `interleave` for the gate (0) or the up projection (1): [2·N, …] → [N, …]."""
    return rows.unflatten(0, (-1, 2, 8))[:, index].flatten(0, 1)
