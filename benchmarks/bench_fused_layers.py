"""`grace.nn.fuse` on one attention's projections and one gated MLP, against separate layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Benchmark, Case, buffer_sets
from benchmarks.layers import GROUP
from grace.nn import PackedLinear, fuse


def packed(rows: int, columns: int) -> PackedLinear:
    """A random 4-bit layer."""
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(rows, columns // GROUP) + 0.5) * columns**-0.5 / 8
    return PackedLinear.from_codes(codes, scales.bfloat16(), None, 4, GROUP)


class Attention(nn.Module):
    """The projections of an attention, behind each other."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.q_proj = packed(columns, columns)
        self.k_proj, self.v_proj = packed(rows, columns), packed(rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K + 2·N]."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class MLP(nn.Module):
    """A gated MLP up to its down projection."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = packed(rows, columns), packed(rows, columns)
        self.down_proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


PARTS = {"qkv": Attention, "gate+up": MLP}


def setup(device: torch.device, part: str, M: int, K: int, N: int) -> Case:
    rows = 2 * N + (K if part == "qkv" else 0)
    weight_bytes = rows * K // 2 + rows * K // GROUP * 2
    sets = buffer_sets(weight_bytes, device)
    models = [nn.ModuleDict({"part": PARTS[part](K, N)}).eval().to(device) for _ in range(sets)]
    fused = copy.deepcopy(models)
    for model in fused:
        fuse(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(M, K, device=device, dtype=dtype)
    return Case(
        sides={
            "grace": lambda i: fused[i % sets]["part"](x),
            "separate": lambda i: models[i % sets]["part"](x),
        },
        exact=lambda: models[0]["part"](x.double()),
        bytes=weight_bytes + M * (K + rows) * dtype.itemsize,
        flops=2 * M * rows * K,
        sets=sets,
    )


QWEN3_VL_2B = [("qkv", 2048, 1024), ("gate+up", 2048, 6144)]
LLAVA_7B = [("qkv", 4096, 4096), ("gate+up", 4096, 11008)]


def sizes(layers: list[tuple[str, int, int]], rows: tuple[int, ...]) -> list[dict[str, object]]:
    return [{"part": part, "M": m, "K": k, "N": n} for part, k, n in layers for m in rows]


BENCHMARK = Benchmark(
    "fused_layers",
    {
        "cuda": sizes(QWEN3_VL_2B + LLAVA_7B, (1, 4, 8, 16, 64, 512, 2048)),
        "cpu": sizes(QWEN3_VL_2B, (1, 4, 16, 64, 256)),
    },
    setup,
)
