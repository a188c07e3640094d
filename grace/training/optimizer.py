"""Parameter groups of a quantized student, and fp32 masters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LOG_SCALE = "log_scale"


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, scale_lr_ratio: float
) -> list[dict[str, Any]]:
    """Three groups of trainable parameters: weights (decayed), norms and biases, log-scales.

    Norms, biases and other vectors are told by their one dimension, whatever a family calls them.

    Log-scales learn `scale_lr_ratio` times as fast and do not decay: a decayed θ = log s would pull
    every scale towards 1. Groups without a parameter are left out.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "scales": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter)].append(parameter)
    options = {
        "weights": {"lr": learning_rate, "weight_decay": weight_decay},
        "norms": {"lr": learning_rate, "weight_decay": 0.0},
        "scales": {"lr": learning_rate * scale_lr_ratio, "weight_decay": 0.0},
    }
    return [
        {"params": parameters, "name": name, **options[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def _group(name: str, parameter: nn.Parameter) -> str:
    if name.rpartition(".")[2] == LOG_SCALE:
        return "scales"
    return "weights" if parameter.dim() > 1 else "norms"


def use_fp32_masters(model: nn.Module) -> None:
    """Hold every floating-point parameter in fp32, in place.

    A bf16 weight of 1 does not see a step below 2⁻⁹: at the usual learning rates nothing would
    change. Mixed precision is autocast's business (`bf16=True`).
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
