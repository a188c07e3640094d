"""dequant_gemm against dense products and PyTorch's own int4 kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Case, buffer_sets
from grace.ops import dequant_gemm
from grace.packing import pack

GROUP = 128


def _tinygemm(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and scales as torch's int4 kernels take them: (code − 8)·scale + zero."""
    unsigned = (codes + 8).to(torch.int32)
    if codes.is_cuda:
        nibbles = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1)
    return packed, pairs.transpose(0, 1).contiguous().to(torch.bfloat16)


def setup(device: torch.device, M: int, N: int, K: int) -> Case:
    sets = buffer_sets(N * K / 2, device)
    dtype = torch.bfloat16
    x = torch.randn(M, K, device=device, dtype=dtype)
    codes = [torch.randint(-8, 8, (N, K), device=device, dtype=torch.int8) for _ in range(sets)]
    scales = torch.rand(N, K // GROUP, device=device).mul(1e-2).to(dtype)
    packed = [pack(c, scales, 4) for c in codes]
    dense = (codes[0] * scales.repeat_interleave(GROUP, 1)).to(dtype)
    dense_sets = [dense] + [dense.clone() for _ in range(buffer_sets(2 * N * K, device) - 1)]
    tiny = [_tinygemm(c, scales) for c in codes]
    int4pack_mm = (
        torch.ops.aten._weight_int4pack_mm
        if device.type == "cuda"
        else torch.ops.aten._weight_int4pack_mm_for_cpu
    )
    sides = {
        "grace": lambda i: dequant_gemm(x, *packed[i], bits=4, group_size=GROUP, out_features=N),
        "bf16": lambda i: F.linear(x, dense_sets[i % len(dense_sets)]),
        "torch int4": lambda i: int4pack_mm(x, tiny[i][0], GROUP, tiny[i][1]),
    }
    if device.type == "cpu":
        wide, x32 = [d.float() for d in dense_sets], x.float()
        sides["fp32"] = lambda i: F.linear(x32, wide[i % len(wide)])
    return Case(
        sides=sides,
        exact=lambda: x.double() @ (codes[0] * scales.double().repeat_interleave(GROUP, 1)).t(),
        bytes=N * K / 2 + N * K / GROUP * 2 + 2 * M * (N + K),
        flops=2.0 * M * N * K,
        sets=sets,
    )


LAYERS = [(4096, 4096), (22016, 4096), (4096, 11008), (2048, 2048), (12288, 2048), (2048, 6144)]
BENCHMARK = Benchmark(
    "dequant_gemm",
    {
        "cuda": [
            {"M": m, "N": n, "K": k}
            for n, k in LAYERS
            for m in (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
        ],
        "cpu": [{"M": m, "N": 4096, "K": 4096} for m in (1, 4, 16, 64)],
    },
    setup,
)
