"""What computes a model's layers while a `Generator` answers: our layers, or other norms and rotary
embeddings, in the places of transformers'."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from grace.generation import decoder, fitting

logger = logging.getLogger(__name__)

LAYERS = ("grace", "torch", "liger", "transformers")
_ROTARY = "apply_rotary_pos_emb"  # of every text model of transformers, in its own module
Replacement = tuple[Any, str, Any]  # whose attribute, its name, what it becomes


@dataclass(frozen=True)
class Layers:
    """What computes the layers of a `Generator`: a name of `LAYERS`, and what is replaced."""

    name: str
    steps: list[Replacement]  # while decode steps run
    prompts: list[Replacement]  # while a prompt goes through the model


def known_layers(name: str | None, model: Any, attention: str | None = None) -> Layers:
    """Layers by name; None: "grace" on a GPU where they fit the model, else "transformers".

    "grace": whole decoder layers of our own ops (`grace.generation.decoder`), prompts included.
    "torch": RMS norms by `torch.nn.functional.rms_norm`, one kernel instead of about eight.
    "liger": RMS norms and the rotary embedding by liger-kernel, one kernel each.
    "transformers": all as it is.

    Args:
        name: one of these, or None.
        model: of transformers.
        attention: what decode steps are to attend by, if that was said: "grace" has its own.

    Raises:
        ValueError: another name; for "grace", a model that does not fit, or an attention; for
            "liger", a model that is not on a GPU, or no liger-kernel.
    """
    if name is not None and name not in LAYERS:
        raise ValueError(f"Generator: layers must be one of {', '.join(LAYERS)}, got {name!r}")
    if name == "grace" or (name is None and attention is None and model.device.type == "cuda"):
        return _grace(model, attention, asked=name is not None)
    if name == "torch":
        return Layers(name, replacements(model, _torch_norm), [])
    if name == "liger":
        return Layers(name, _liger(model), [])
    return _UNCHANGED


_UNCHANGED = Layers("transformers", [], [])


def _grace(model: Any, attention: str | None, asked: bool) -> Layers:
    if attention is not None:
        raise ValueError(
            "Generator: attention must be None with layers 'grace', which attend by an op of their "
            f"own, got {attention!r}"
        )
    why = fitting.why_not(model)
    if not why:
        found = decoder.replacements(model)
        return Layers("grace", found, found)
    if asked:
        raise ValueError(
            f"Generator: layers 'grace' must fit the model, got one they do not: {why}"
        )
    logger.info("Generator: layers are those of transformers: %s", why)
    return _UNCHANGED


def _liger(model: Any) -> list[Replacement]:
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
