"""GPTQ's packing, which vLLM's kernels start from."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_gptq(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] as int32 [K/8, N]: nibble j of word [i, n] is code [n, 8i + j] + 8."""
    rows, columns = codes.shape
    words = torch.zeros(rows, columns // 8, dtype=torch.int32, device=codes.device)
    eights = codes.view(rows, columns // 8, 8)
    for place in range(8):
        words |= (eights[:, :, place].to(torch.int32) + 8) << 4 * place
    return words.t().contiguous()
