"""Linear layers at low bits: `FakeQuantLinear` to train, `PackedLinear` to run, alone or fused."""

from grace.nn.fake_quant_linear import FakeQuantLinear
from grace.nn.fused_linear import FusedLinear, PackedPart
from grace.nn.fusion import FusedMLP, fuse, unfusable, unfuse
from grace.nn.head import quantize_head
from grace.nn.packed_linear import PackedLinear

__all__ = [
    "FakeQuantLinear",
    "FusedLinear",
    "FusedMLP",
    "PackedLinear",
    "PackedPart",
    "fuse",
    "quantize_head",
    "unfusable",
    "unfuse",
]
