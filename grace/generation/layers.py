"""Other norms and rotary embeddings in the places of transformers', while a decode step runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

LAYERS = ("torch", "liger")
_ROTARY = "apply_rotary_pos_emb"  # of every text model of transformers, in its own module
Replacement = tuple[Any, str, Any]  # whose attribute, its name, what it becomes


def known_layers(name: str | None, model: Any) -> list[Replacement] | None:
    """What is replaced in a model's decode step; None where nothing is.

    "torch": RMS norms by `torch.nn.functional.rms_norm`, one kernel instead of about eight.
    "liger": RMS norms and the rotary embedding by liger-kernel, one kernel each.

    Raises:
        ValueError: another name; for "liger", a model that is not on a GPU, or no liger-kernel.
    """
    if name is None:
        return None
    if name not in LAYERS:
        raise ValueError(f"Generator: layers must be one of {', '.join(LAYERS)}, got {name!r}")
    if name == "torch":
        return replacements(model, _torch_norm)
    if model.device.type != "cuda":
        raise ValueError(f"Generator: layers 'liger' must be on a GPU, got {model.device}")
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        missing = "liger-kernel must be installed (pip install grace-vlm[fast]), got none"
        raise ValueError(f"Generator: {missing}") from None

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    return replacements(model, norm, liger_rotary_pos_emb)


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def replacements(
    model: Any, norm: Callable[..., Tensor], rotary: Callable[..., Any] | None = None
) -> list[Replacement]:
    """What to replace of a model by an RMS norm ``norm(x, weight, eps)`` and a rotary embedding
    ``rotary(q, k, cos, sin)``."""
    found: list[Replacement] = [
        (module, "forward", _norm(module, norm))
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    ]
    homes = {type(module).__module__ for module in model.modules()}
    for home in sorted(homes) if rotary else ():
        place = sys.modules.get(home)
        if home.startswith("transformers.models.") and hasattr(place, _ROTARY):
            found.append((place, _ROTARY, rotary))
    return found


def _norm(module: nn.Module, norm: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    weight, eps = module.weight, module.variance_epsilon
    return lambda x: norm(x, weight, eps)


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
