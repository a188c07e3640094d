"""`PackedLinear`: a linear layer that runs at 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from grace.formats import compressed_tensors
from grace.formats.compressed_tensors import TENSORS, Scheme
from grace.nn._keep_dtype import keep_dtype
from grace.ops.dequant_gemm import dequant_gemm
from grace.packing import TILE, dequantize, pack, unpack

_CHUNK = 1 << 22  # codes that packing has in work at once


class PackedLinear(nn.Module):
    """``y = x · (codes · scales)ᵀ + bias`` through `grace.ops.dequant_gemm`, for inference.

    In memory the weight lies in the layout of `grace.packing` (buffers ``qweight`` and ``scales``);
    in a state dict it is always three compressed-tensors tensors, bit for bit the same codes and
    scales, so that what `save_pretrained` writes is what other programs read.

    A layer made by the constructor has no weights yet: it holds the three tensors of the format,
    empty, for a loader to fill in; `pack_` then brings them into the packed layout.

    Raises:
        ValueError: bits other than 4 and 8, or a group size that is not -1 and does not divide
            in_features.
    """

    weight_packed: Tensor
    qweight: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        bits: int = 4,
        group_size: int = 128,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        shapes = compressed_tensors.shapes(out_features, in_features, self.scheme, "PackedLinear")
        dtypes = (torch.int32, scale_dtype, torch.int64)
        for name, kind in zip(TENSORS, dtypes, strict=True):
            self.register_buffer(name, torch.empty(shapes[name], device=device, dtype=kind))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        bits: int = 4,
        group_size: int = 128,
    ) -> PackedLinear:
        """Packs a weight given by its codes and scales.

        Args:
            codes: int8 [N, K], within [-2^(bits-1), 2^(bits-1) - 1].
            scales: [N, G] in bfloat16, float16 or float32; kept as they are.
            bias: [N] or None.
            bits: 4 or 8.
            group_size: K/G, or -1 for one group a row.

        Raises:
            ValueError: shapes, dtypes or codes outside of the above.
        """
        if codes.dim() != 2:
            raise ValueError(f"PackedLinear: codes must be [N, K], got {list(codes.shape)}")
        rows, columns = codes.shape
        layer = cls(columns, rows, bits=bits, group_size=group_size, device="meta")
        layer._set(codes, scales)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer.eval()

    @property
    def scheme(self) -> Scheme:
        """Bits and group size."""
        return Scheme(self.bits, self.group_size)

    @property
    def is_packed(self) -> bool:
        """Whether the weight is there, in the packed layout."""
        return "qweight" in self._buffers

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` [..., in_features] → [..., out_features], in the dtype of ``x``.

        Args:
            x: the input.
            residual: like the result, or None; added before the one rounding.

        Raises:
            ValueError: other features, a residual unlike the result, or no weights yet.
        """
        qweight, scales = self._packed()
        if x.shape[-1] != self.in_features:  # with one group a row the op knows K up to a tile
            raise ValueError(
                f"PackedLinear: x must have {self.in_features} features, got {x.shape[-1]}"
            )
        return dequant_gemm(
            x,
            qweight,
            scales,
            None if self.bias is None else self.bias.to(x.dtype),
            bits=self.bits,
            group_size=self.group_size,
            out_features=self.out_features,
            residual=residual,
        )

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(codes int8 [out_features, in_features], scales [out_features, groups]), exactly."""
        qweight, scales = self._packed()
        return unpack(qweight, scales, self.bits, **self._sizes())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``codes · scales`` [out_features, in_features]: exact in float32, then rounded once."""
        qweight, scales = self._packed()
        return dequantize(qweight, scales, self.bits, **self._sizes()).to(dtype)

    @torch.no_grad()
    def pack_(self, name: str = "PackedLinear") -> PackedLinear:
        """Brings the tensors that a loader filled in into the packed layout, and lets them go.

        Args:
            name: what messages call the layer.

        Raises:
            ValueError: tensors that do not fit this layer, its bits or its group size, or are not
                in memory.
        """
        tensors = {key: getattr(self, key) for key in TENSORS}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(f"PackedLinear: weights must be in memory, got {name} offloaded")
        self._set_encoded(tensors, name)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}"
        )

    def _packed(self) -> tuple[Tensor, Tensor]:
        if not self.is_packed:
            raise ValueError("PackedLinear: weights must be loaded before use, got none")
        return self.qweight, self.scales

    def _sizes(self) -> dict[str, int]:
        return {
            "group_size": self.group_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
        }

    def _set(self, codes: Tensor, scales: Tensor) -> None:
        groups = 1 if self.group_size == -1 else self.in_features // self.group_size
        expected = (self.out_features, groups)
        if tuple(scales.shape) != expected:
            raise ValueError(
                f"PackedLinear: scales must be {list(expected)}, got {list(scales.shape)}"
            )
        self._take(*pack(codes, scales, self.bits))

    def _set_encoded(self, tensors: Mapping[str, Tensor], name: str) -> None:
        words, scales, shape = (tensors[key] for key in TENSORS)
        compressed_tensors.check(tensors, self.scheme, name)
        if shape.tolist() != [self.out_features, self.in_features]:
            raise ValueError(
                f"PackedLinear: {name}.weight_shape must be "
                f"[{self.out_features}, {self.in_features}], got {shape.tolist()}"
            )
        # By blocks of whole tiles, so that a large layer's codes are never all there at once.
        rows = max(1, _CHUNK // (self.in_features * TILE)) * TILE
        parts = [
            pack(compressed_tensors.codes_of(block, self.bits, self.in_features), s, self.bits)
            for block, s in zip(words.split(rows), scales.split(rows), strict=True)
        ]
        self._take(torch.cat([part[0] for part in parts]), torch.cat([p[1] for p in parts], dim=1))

    def _take(self, qweight: Tensor, scales: Tensor) -> None:
        for name in TENSORS:
            self._buffers.pop(name, None)
        # Not in state dicts: there the weight has its format's names.
        self.register_buffer("qweight", qweight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scales = self._buffers["scales" if self.is_packed else "weight_scale"]
        return cast(PackedLinear, super()._apply(keep_dtype(fn, scales), recurse))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            encoded = compressed_tensors.encode(*self.unpack(), self.bits)
            destination.update({prefix + name: tensor for name, tensor in encoded.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {prefix + name: name for name in TENSORS}
        given = {own: state_dict[key] for key, own in names.items() if key in state_dict}
        if len(given) == len(TENSORS):
            held = self._packed()[0] if self.is_packed else self.weight_packed
            if not held.is_meta:
                given = {name: tensor.to(held.device) for name, tensor in given.items()}
            self._set_encoded(given, prefix.removesuffix("."))
        elif self.is_packed:
            missing_keys.extend(key for key, own in names.items() if own not in given)
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
