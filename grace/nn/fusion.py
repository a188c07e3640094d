"""`fuse` and `unfuse`: layers of a packed model that take the same input become one call.

What is fused in a decoder layer, by the structure of its modules and not by their classes:

- ``q_proj``, ``k_proj``, ``v_proj``: one product (`FusedLinear`), of which each takes its part;
- ``gate_proj``, ``up_proj``, ``down_proj`` of a module whose forward computes
  ``down(silu(gate(x)) * up(x))``: one product with SwiGLU (`FusedMLP`).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn import functional as F

from grace.nn.fake_quant_linear import FakeQuantLinear
from grace.nn.fused_linear import FusedLinear, PackedPart
from grace.nn.packed_linear import PackedLinear

logger = logging.getLogger(__name__)

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED_QKV, _FUSED_MLP = "qkv_proj", "gate_up_proj"  # names of the fused weights


class FusedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, gate and up in one call.

    It has the submodules and plain attributes of the module that it stands for, and
    ``gate_up_proj``, which holds the weight of both projections.
    """

    gate_up_proj: FusedLinear
    down_proj: nn.Module

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        own = {key: value for key, value in vars(mlp).items() if not key.startswith("_")}
        vars(self).update(own)
        fused = _fuse_children(mlp, _MLP[:2], swiglu=True)
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.gate_up_proj = fused
        self._replaced = (mlp,)  # in a tuple: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] → what ``down_proj`` gives."""
        out: Tensor = self.down_proj(self.gate_up_proj(x))
        return out

    def restore(self) -> nn.Module:
        """The module that was replaced, with the weights that are here now."""
        (mlp,) = self._replaced
        for name, child in self.named_children():
            if name != _FUSED_MLP:
                setattr(mlp, name, _own(child))
        return mlp.train(self.training)


def fuse(model: nn.Module) -> list[str]:
    """Lets packed layers of ``model`` that take the same input run as one call, in place.

    Queries, keys and values become one product, gate and up of a SiLU-gated MLP one product with
    SwiGLU. The model computes the same, up to the rounding between gate, SiLU and up, which falls
    away; its state dict, and so what `save_pretrained` and `grace.export` write, is the same, bit
    for bit. There is one copy of every weight, as before. `unfuse` is the way back.

    A module stays as it is where its layers are not all `PackedLinear` and in memory, differ in
    width, group size, dtype or device, are in training mode or have hooks (which would no longer
    run), or where its forward is another. `unfusable` and the log (level INFO) say which and why.

    Returns:
        Names of the modules whose layers were fused.
    """
    found = dict(_candidates(model))
    fused = []
    for name, reason in found.items():
        if reason is not None:
            logger.info("fuse leaves %s as it is: %s", name, reason)
            continue
        module = model.get_submodule(name)
        if _has(module, _MLP):
            model.set_submodule(name, FusedMLP(module))
        else:
            _fuse_qkv(module)
        fused.append(name)
    return fused


def unfuse(model: nn.Module) -> list[str]:
    """Undoes `fuse`: every layer has a weight of its own again, every MLP is what it was.

    Returns:
        Names of the modules whose layers were fused.
    """
    fused = {n: m for n, m in model.named_modules() if _is_fused(m)}
    for name, module in fused.items():
        if isinstance(module, FusedMLP):
            model.set_submodule(name, module.restore())
            continue
        for hook in module.qkv_proj.hooks:
            hook.remove()
        for part in _QKV:
            setattr(module, part, _own(module.get_submodule(part)))
        delattr(module, _FUSED_QKV)
    return list(fused)


def unfusable(model: nn.Module) -> dict[str, str]:
    """Modules with low-bit layers that `fuse` leaves as they are, by name: why."""
    return {name: reason for name, reason in _candidates(model) if reason is not None}


def _fuse_qkv(attention: Any) -> None:
    fused = _fuse_children(attention, _QKV, swiglu=False)
    setattr(attention, _FUSED_QKV, fused)
    # What one layer computed for the others lives no longer than a call of their owner.
    fused.hooks = (
        attention.register_forward_pre_hook(fused.share),
        attention.register_forward_hook(fused.stop_sharing, always_call=True),
    )


def _fuse_children(owner: Any, names: tuple[str, ...], swiglu: bool) -> FusedLinear:
    fused = FusedLinear([getattr(owner, name) for name in names], swiglu=swiglu)
    for index, name in enumerate(names):
        setattr(owner, name, PackedPart(fused, index))
    return fused


def _own(layer: nn.Module) -> nn.Module:
    return layer.fused.layer(layer.index) if isinstance(layer, PackedPart) else layer


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedMLP) or isinstance(module._modules.get(_FUSED_QKV), FusedLinear)


# --- what can be fused ---------------------------------------------------------------------------


def _candidates(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Modules with low-bit layers to fuse, and why they cannot be (None: they can)."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            continue
        if _has(module, _QKV):
            layers = {part: module.get_submodule(part) for part in _QKV}
            yield name, _why_not(layers) or _why_not_attention(module)
        elif _has(module, _MLP):
            layers = {part: module.get_submodule(part) for part in _MLP[:2]}
            yield name, _why_not(layers) or _why_not_mlp(name, module)


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    children = [module._modules.get(name) for name in names]
    low_bit = any(isinstance(child, PackedLinear | FakeQuantLinear) for child in children)
    return low_bit and None not in children


def _why_not(layers: Mapping[str, nn.Module]) -> str | None:
    for name, layer in layers.items():
        if type(layer) is not PackedLinear:
            return f"{name} must be a PackedLinear, got {type(layer).__name__}"
        if layer.training:
            return f"{name} must be in eval mode, got training mode"
        if _hooked(layer):
            return f"{name} must have no hooks and its own forward, got others"
        tensors = [*layer.parameters(), *layer.buffers()]
        if not layer.is_packed or any(tensor.is_meta for tensor in tensors):
            return f"{name} must be in memory, got it empty or offloaded"
        kinds = {type(tensor) for tensor in tensors} - {Tensor, nn.Parameter, nn.Buffer}
        if kinds:
            return f"{name} must hold whole tensors, got {kinds.pop().__name__}"
    for what, of in _ALIKE.items():
        values = {name: of(layer) for name, layer in layers.items()}
        if len({value for value in values.values() if value is not None}) > 1:
            return f"{what} must be the same, got " + ", ".join(
                f"{n} {v}" for n, v in values.items()
            )
    return None


_ALIKE: dict[str, Any] = {
    "in_features": lambda layer: layer.in_features,
    "bits": lambda layer: layer.bits,
    "group_size": lambda layer: layer.group_size,
    "device": lambda layer: layer.qweight.device,
    "dtype of scales": lambda layer: layer.scales.dtype,
    "dtype of bias": lambda layer: None if layer.bias is None else layer.bias.dtype,
}


def _why_not_attention(module: nn.Module) -> str | None:
    return (
        f"{_FUSED_QKV} must be a free name, got it taken" if hasattr(module, _FUSED_QKV) else None
    )


def _why_not_mlp(name: str, module: nn.Module) -> str | None:
    gate, up = (cast(PackedLinear, module.get_submodule(part)) for part in _MLP[:2])
    if not name:
        return "the MLP must be a submodule of what is fused, got it alone"
    if hasattr(module, _FUSED_MLP):
        return f"{_FUSED_MLP} must be a free name, got it taken"
    if _hooked(module) or any(_hooked(child) for child in module.children()):
        return "the MLP must have no hooks and its class's forward, got others"
    if next(module.parameters(recurse=False), None) is not None or module._buffers:
        return "the MLP must have no tensors of its own, got some"
    if gate.out_features != up.out_features or gate.out_features % 8:
        sizes = f"{gate.out_features} and {up.out_features}"
        return f"gate_proj and up_proj must have as many rows, a multiple of 8, got {sizes}"
    if not _is_swiglu(module):
        return "forward must be down_proj(silu(gate_proj(x)) * up_proj(x)), got another"
    return None


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _hooked(module: nn.Module) -> bool:
    """Whether a call, a save or a load of the module does more than its class says."""
    return "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in _HOOKS)


class _Tracer(fx.Tracer):
    """Follows a module's forward down to its projections."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name in _MLP


def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether forward is ``down_proj(silu(gate_proj(x)) * up_proj(x))``: it is read, not run."""
    try:
        nodes = list(_Tracer().trace(mlp).nodes)
    except Exception:  # noqa: BLE001 (a forward that cannot be traced is another forward)
        return False
    x, by_target = nodes[0], {node.target: node for node in nodes[1:-1]}
    if len(by_target) != 5:  # something else is computed, or given
        return False
    gate, up, down = (by_target.get(name) for name in _MLP)
    silu, product = by_target.get(F.silu), by_target.get(operator.mul)
    if gate is None or up is None or down is None or silu is None or product is None:
        return False
    return (
        gate.args == up.args == (x,)
        and silu.args[0] is gate
        and set(product.args) == {silu, up}
        and down.args == (product,)
        and nodes[-1].args == (down,)
    )
