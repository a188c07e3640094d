"""Linear layers at low bits: `FakeQuantLinear` to train, `PackedLinear` to run."""

from grace.nn.fake_quant_linear import FakeQuantLinear
from grace.nn.packed_linear import PackedLinear

__all__ = ["FakeQuantLinear", "PackedLinear"]
