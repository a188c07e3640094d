"""liger-kernel's RMS norm and rotary embedding in the place of transformers', while a step runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_ROTARY = "apply_rotary_pos_emb"  # of every text model of transformers, in its own module
Replacement = tuple[Any, str, Any]  # whose attribute, its name, what it becomes


def liger_layers(model: Any) -> list[Replacement]:
    """What liger-kernel can compute of a model's decode step: one kernel a norm, one a layer's
    rotary embedding, instead of about eight each.

    Raises:
        ValueError: liger-kernel is not installed, or the model is not on a GPU.
    """
    if model.device.type != "cuda":
        raise ValueError(f"Generator: liger must have a model on a GPU, got {model.device}")
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        missing = "liger-kernel must be installed (pip install grace-vlm[fast]), got none"
        raise ValueError(f"Generator: {missing}") from None
    return replacements(model, LigerRMSNormFunction.apply, liger_rotary_pos_emb)


def replacements(
    model: Any, norm: Callable[..., Tensor], rotary: Callable[..., Any]
) -> list[Replacement]:
    """What to replace of a model by an RMS norm ``norm(x, weight, eps, offset, casting, in_place)``
    and a rotary embedding ``rotary(q, k, cos, sin)``."""
    found: list[Replacement] = [
        (module, "forward", _norm(module, norm))
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    ]
    homes = {type(module).__module__ for module in model.modules()}
    for home in sorted(homes):
        place = sys.modules.get(home)
        if home.startswith("transformers.models.") and hasattr(place, _ROTARY):
            found.append((place, _ROTARY, rotary))
    return found


def _norm(module: nn.Module, norm: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    weight, eps = module.weight, module.variance_epsilon
    return lambda x: norm(x, weight, eps, 0.0, "llama", False)


@contextlib.contextmanager
def replaced(layers: list[Replacement] | None) -> Iterator[None]:
    """Puts replacements in their places inside, and what was there back."""
    was = [(owner, name, vars(owner).get(name)) for owner, name, _ in layers or ()]
    try:
        for owner, name, new in layers or ():
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in was:
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
