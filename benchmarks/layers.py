"""Linear layers of the models that dequant_gemm is measured on, and random weights for one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import buffer_sets
from grace.packing import pack

GROUP = 128


class Shape(NamedTuple):
    """Of a weight [N, K]."""

    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model; projections that read the same input are one layer."""

    model: str
    part: str
    shape: Shape


def _title(part: str) -> str:
    return part.replace("_and_", "+").replace("_or_", "/")


def _layers(model: str, **parts: tuple[int, int]) -> list[Layer]:
    return [Layer(model, _title(part), Shape(*nk)) for part, nk in parts.items()]


LAYERS = [
    *_layers(
        "LLaVA-1.5-7B",
        q_or_k_or_v_or_o=(4096, 4096),
        qkv=(12288, 4096),
        gate_or_up=(11008, 4096),
        gate_and_up=(22016, 4096),
        down=(4096, 11008),
    ),
    *_layers(
        "Qwen3-VL-2B",
        qkv=(4096, 2048),
        o=(2048, 2048),
        gate_and_up=(12288, 2048),
        down=(2048, 6144),
    ),
    *_layers(
        "Qwen3-VL-8B",
        qkv=(6144, 4096),
        o=(4096, 4096),
        gate_and_up=(24576, 4096),
        down=(4096, 12288),
    ),
    *_layers(
        "Qwen2-VL-2B",
        qkv=(2048, 1536),
        o=(1536, 1536),
        gate_and_up=(17920, 1536),
        down=(1536, 8960),
    ),
]
SHAPES = list(dict.fromkeys(layer.shape for layer in LAYERS))


def names(shape: Shape) -> str:
    """The layers of that shape: ``LLaVA-1.5-7B q/k/v/o, Qwen3-VL-8B o``."""
    return ", ".join(f"{layer.model} {layer.part}" for layer in LAYERS if layer.shape == shape)


def shapes_of(texts: Iterable[str]) -> list[Shape]:
    """Of ``4096x11008`` and the like; any shape, listed above or not."""
    shapes = []
    for text in texts:
        n, times, k = text.partition("x")
        if not (times and n.isdigit() and k.isdigit()):
            raise ValueError(f"layers must be NxK, got {text}")
        shapes.append(Shape(int(n), int(k)))
    return shapes


class RandomLayer:
    """Random codes and scales of one layer, in so many sets that no set is found in the cache.

    Weights are made as sides ask for them and are kept, so that all sizes of x share them.
    """

    def __init__(
        self,
        device: torch.device,
        shape: Shape,
        bits: int = 4,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.device, self.shape, self.bits, self.dtype = device, shape, bits, dtype
        self.sets = buffer_sets(shape.n * shape.k * bits / 8, device)
        top = 2 ** (bits - 1)
        self.codes = [
            torch.randint(-top, top, shape, device=device, dtype=torch.int8)
            for _ in range(self.sets)
        ]
        self.scales = torch.rand(shape.n, shape.k // GROUP, device=device).mul(1e-2).to(dtype)

    def calls(self, m: int) -> int:
        """Of a side in one sample: a turn through the sets, or about 4 ms of arithmetic."""
        flops = 2.0 * m * self.shape.n * self.shape.k
        fast = 8e14 if self.device.type == "cuda" else 4e11
        return max(2, min(self.sets, int(4e-3 * fast / flops)))

    @cached_property
    def packed(self) -> list[tuple[Tensor, Tensor]]:
        """As ``grace.ops.dequant_gemm`` takes them."""
        return [pack(codes, self.scales, self.bits) for codes in self.codes]

    @cached_property
    def dense(self) -> list[Tensor]:
        """q·s rounded to the layer's dtype: what a model in that dtype multiplies with."""
        first = self.exact.to(self.dtype)
        count = buffer_sets(self.shape.n * self.shape.k * self.dtype.itemsize, self.device)
        return [first, *(first.clone() for _ in range(count - 1))]

    @cached_property
    def exact(self) -> Tensor:
        """The weight of set 0 in float64."""
        groups = self.codes[0].double().view(self.shape.n, -1, GROUP)
        return (groups * self.scales.double().unsqueeze(-1)).view(self.shape)

    def bytes(self, m: int) -> float:
        """That a product with m rows must move: codes, scales, x and the result, once."""
        n, k = self.shape
        weight = n * k * self.bits / 8 + n * k / GROUP * self.scales.element_size()
        return weight + self.dtype.itemsize * m * (n + k)

    def flops(self, m: int) -> float:
        """Of a product with m rows of x."""
        return 2.0 * m * self.shape.n * self.shape.k
