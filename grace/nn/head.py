"""The output head at 8 bits: `quantize_head`, and what says `lm_head_bits`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grace.log_scale import init_log_scale
from grace.nn.packed_linear import PackedLinear
from grace.ops.quantize_pack import quantize_pack

_ROWS = 16384  # of the head that are in work at once; a multiple of a tile


@torch.no_grad()
def quantize_head(model: Any, bits: int = 8, group_size: int = 128) -> str:
    """Replaces a model's output head by a `PackedLinear`, in place: half the bytes to read a token.

    Each group's scale is its largest magnitude over 127, weights go to the nearest code: **logits
    change**, by about 0.4 % of their spread. A head that is tied to the embedding leaves the
    embedding as it is, and is then a copy beside it. For serving: the model must not be saved then.

    Args:
        model: of transformers, with `get_output_embeddings`.
        bits: 8.
        group_size: columns that share a scale; a whole row where it does not divide them.

    Returns:
        The head's name.

    Raises:
        ValueError: other bits, or a head that is not an `nn.Linear` in memory.
    """
    head = check_head("quantize_head", model, bits)
    group = group_size if head.in_features % group_size == 0 else -1
    name = next(n for n, module in model.named_modules() if module is head)
    model.set_submodule(name, _packed(head, bits, group))
    return name


def check_head(where: str, model: Any, bits: Any) -> nn.Linear:
    """The output head of a model, if it can be had at ``bits``.

    Raises:
        ValueError: other bits than 8, or a head that is not an `nn.Linear` in memory; begins with
            ``where``.
    """
    if bits != 8:
        raise ValueError(f"{where}: lm_head_bits must be 8, got {bits}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        kind = type(head).__name__
        raise ValueError(f"{where}: the output head must be an nn.Linear, got {kind}")
    if head.weight.is_meta:
        raise ValueError(f"{where}: the output head must be in memory, got it offloaded")
    return head


def _packed(head: nn.Linear, bits: int, group: int) -> PackedLinear:
    layer = PackedLinear(
        head.in_features, head.out_features, bits=bits, group_size=group, device="meta"
    )
    parts = []
    for rows in head.weight.split(_ROWS):  # in blocks of whole tiles
        log_scale = init_log_scale(rows, bits, group, method="absmax")
        parts.append(quantize_pack(rows, log_scale, bits=bits, group_size=group))
    layer._take(torch.cat([part[0] for part in parts]), torch.cat([p[1] for p in parts], dim=1))
    if head.bias is not None:
        layer.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
    return layer.eval()
