"""dequant_gemm against dense products and other libraries' int4 kernels, with cold weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Absent, Benchmark, Case, Side
from benchmarks.layers import GROUP, SHAPES, RandomLayer, Shape
from benchmarks.peers import PEERS, Peer
from benchmarks.peers.peer import Product
from grace.ops import dequant_gemm

DENSE = {"bfloat16": "bf16", "float16": "fp16"}  # sides that multiply with the dense weight


@functools.lru_cache(maxsize=1)
def layer_of(device: torch.device, shape: Shape, bits: int, dtype: torch.dtype) -> SharedLayer:
    """The last layer asked for: its weights serve all sizes of x."""
    return SharedLayer(device, shape, bits, dtype)


class SharedLayer(RandomLayer):
    """A random layer with its weights as each peer takes them, made at the peer's first call."""

    @functools.cached_property
    def _products(self) -> dict[str, list[Product] | Absent]:
        return {}

    def products(self, peer: Peer) -> list[Product]:
        """The peer's product with every set; raises Absent, and again, where it has none."""
        if peer.name not in self._products:
            self._products[peer.name] = self._prepared(peer)
        products = self._products[peer.name]
        if isinstance(products, Absent):
            raise products
        return products

    def _prepared(self, peer: Peer) -> list[Product] | Absent:
        try:
            with peer.getting_ready():
                return [peer.prepare(codes, self.scales) for codes in self.codes]
        except Absent as reason:
            return reason

    @functools.cached_property
    def wide(self) -> list[Tensor]:
        """The dense weights in float32."""
        return [weight.float() for weight in self.dense]


class PeerSide:
    """A peer on one layer and one x, which gets ready at its first call: a harness' side."""

    def __init__(self, peer: Peer, layer: SharedLayer, x: Tensor):
        self.peer, self.layer, self.x = peer, layer, x
        self._products: list[Product] = []

    def __call__(self, i: int) -> Tensor:
        """The product with set i."""
        if not self._products:
            products = self.layer.products(self.peer)
            with self.peer.getting_ready():
                self._check(products[0](self.x))
            self._products = products
        return self._products[i % len(self._products)](self.x)

    def _check(self, result: Tensor) -> None:
        if result.is_cuda:
            torch.cuda.synchronize()  # a failure belongs to the peer
        if result.shape != (self.x.shape[0], self.layer.shape.n):
            raise Absent(f"gives a result of shape {list(result.shape)}")


def _over(weights: Callable[[], list[Tensor]], x: Tensor) -> Side:
    return lambda i: F.linear(x, weights()[i % len(weights())])


def _ours(layer: RandomLayer, x: Tensor, i: int) -> Tensor:
    weight, scales = layer.packed[i % layer.sets]
    return dequant_gemm(
        x, weight, scales, bits=layer.bits, group_size=GROUP, out_features=layer.shape.n
    )


def setup(
    device: torch.device, M: int, N: int, K: int, bits: int = 4, dtype: str = "bfloat16"
) -> Case:
    layer = layer_of(device, Shape(N, K), bits, getattr(torch, dtype))
    x = torch.randn(M, K, device=device, dtype=layer.dtype)
    sides: dict[str, Side] = {
        "grace": partial(_ours, layer, x),
        DENSE[dtype]: _over(lambda: layer.dense, x),
    }
    if device.type == "cpu":
        sides["fp32"] = _over(lambda: layer.wide, x.float())
    absent = {}
    for peer in PEERS if (bits, dtype) == (4, "bfloat16") else ():
        if (why := peer.reason(M, N, K)) != "":
            absent[peer.name] = why
        else:
            sides[peer.name] = PeerSide(peer, layer, x)
    return Case(
        sides=sides,
        exact=lambda: x.double() @ layer.exact.t(),
        bytes=layer.bytes(M),
        flops=layer.flops(M),
        sets=layer.calls(M),
        absent=absent,
    )


ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OTHER_DTYPES: list[dict[str, Any]] = [
    {"M": m, "N": n, "K": k, **kind}
    for n, k in ((4096, 4096), (2048, 2048), (22016, 4096))
    for kind in ({"bits": 8}, {"dtype": "float16"})
    for m in (1, 8, 16, 64, 256, 1024, 4096)
]
BENCHMARK = Benchmark(
    "dequant_gemm",
    {
        "cuda": [*({"M": m, "N": n, "K": k} for n, k in SHAPES for m in ROWS), *OTHER_DTYPES],
        "cpu": [
            {"M": m, "N": n, "K": k}
            for n, k in ((4096, 4096), (11008, 4096))
            for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        ],
    },
    setup,
)
