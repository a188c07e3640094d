"""Small models of every family for post-training quantization, with something for it to do."""

from __future__ import annotations

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
