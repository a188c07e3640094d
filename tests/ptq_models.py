"""Small models of every family for post-training quantization, with something for it to do; and a
weight with the Hessian of its inputs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import families
import torch
from torch import Tensor, nn

SMALL = {"num_hidden_layers": 2}


def inputs(kind: str) -> dict[str, Tensor]:
    return {name: value for name, value in families.batch(kind).items() if name != "labels"}


def made(kind: str, **text: Any) -> nn.Module:
    """A model whose norms and weights are not all alike, so that methods have something to do."""
    model = families.FAMILIES[kind](**{**SMALL, **text}).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and "layers" in name:
                parameter[:3] *= 9
    return model


@lru_cache
def problem(rows: int, columns: int, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of unlike sizes, in float64."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    mixing = mixing / columns**0.5 + torch.eye(columns, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=random, dtype=torch.float64) @ mixing
    x *= torch.linspace(0.2, 3, columns, dtype=torch.float64)
    return weight, 2 / tokens * x.t() @ x
