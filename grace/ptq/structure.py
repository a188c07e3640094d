"""How data flows through a decoder layer, found by running it and not by names.

Linears that are given the same tensor form a group (q, k and v; gate and up; o; down). A group may
be *folded* when the channels of its input can be divided, and its columns multiplied, by the same
numbers without changing what the layer computes: where a norm's output is that input, and where a
linear's output channels reach it unmixed and in proportion (v → o, up → down). Whether they do is
tried: with powers of two, which floating point carries through exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace.ptq.calibration import first_tensor

Run = Callable[[], Tensor]  # one forward of the layer, on the same input every time


@dataclass(frozen=True)
class Group:
    """Linears of a decoder layer that read the same tensor, by name, in the order they run.

    Attributes:
        names: of the linears.
        block: the lowest module that holds them all, by name; "" is the layer itself.
        source: the norm or linear whose channels may be divided, by name; None: there is none.
    """

    names: tuple[str, ...]
    block: str
    source: str | None = None


def groups(layer: nn.Module, run: Run) -> list[Group]:
    """The groups of a decoder layer, in the order they run; without their sources."""
    return [Group(tuple(names), _common(names)) for names in _trace(layer, run)[0]]


def with_source(layer: nn.Module, group: Group, run: Run) -> Group:
    """The group with the module that it may be folded into, if there is one."""
    shared, made, outputs = _trace(layer, run)
    place = next(i for i, names in enumerate(shared) if set(names) >= set(group.names))
    before = [name for names in shared[:place] for name in names]
    modules = dict(layer.named_modules())
    width = modules[group.names[0]].in_features
    norms = [name for name, key in outputs.items() if key == made[place]]
    linears = [name for name in reversed(before) if modules[name].out_features == width]
    for name in (*norms, *linears):
        if _folds(layer, name, group.names, run):
            return Group(group.names, group.block, name)
    return group


@torch.no_grad()
def fold(source: nn.Module, linears: Sequence[nn.Module], scale: Tensor) -> None:
    """Divide the output channels of ``source`` by ``scale`` [K] and multiply the columns of
    ``linears`` by it, in place."""
    for parameter in (source.weight, source.bias if hasattr(source, "bias") else None):
        if isinstance(parameter, Tensor):
            over = scale.view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(parameter.float() / over)
    for linear in linears:
        assert isinstance(linear.weight, Tensor)
        linear.weight.copy_(linear.weight.float() * scale)


Key = tuple[int, torch.Size, tuple[int, ...]]


def _trace(layer: nn.Module, run: Run) -> tuple[list[list[str]], list[Key], dict[str, Key]]:
    """Linears by the tensor they read, those tensors, and the outputs of modules with a weight a
    channel (norms). A tensor is told by where it lies: all of them are kept until the end."""
    names: list[list[str]] = []
    keys: list[Key] = []
    outputs: dict[str, Key] = {}
    alive: list[Tensor] = []

    def key(x: Tensor) -> Key:
        alive.append(x)
        return x.data_ptr(), x.shape, x.stride()

    def linear(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple) -> None:
            found = key(args[0])
            if found not in keys:
                keys.append(found)
                names.append([])
            names[keys.index(found)].append(name)

        return hook

    def norm(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            outputs[name] = key(first_tensor(output))

        return hook

    hooks: list[Any] = []
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "in_features"):
            hooks.append(module.register_forward_pre_hook(linear(name)))
        elif isinstance(weight, Tensor) and weight.dim() == 1:
            hooks.append(module.register_forward_hook(norm(name)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return names, keys, outputs


def _common(names: Sequence[str]) -> str:
    """The name of the lowest module that holds them all; a linear alone is its own block."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    same = []
    for steps in zip(*parts, strict=False):
        if len(set(steps)) > 1:
            break
        same.append(steps[0])
    return ".".join(same)


@torch.no_grad()
def _folds(layer: nn.Module, source: str, names: Sequence[str], run: Run) -> bool:
    """Whether the layer, and each linear, gives the same with the channels of ``source`` divided
    by powers of two and the columns of ``names`` multiplied by them."""
    modules = dict(layer.named_modules())
    touched = [modules[source], *(modules[name] for name in names)]
    kept = [(p, p.detach().clone()) for m in touched for p in m.parameters(recurse=False)]
    before = _outputs(layer, names, run)
    width = modules[names[0]].in_features
    powers = torch.randint(-1, 3, (width,), generator=torch.Generator().manual_seed(0))
    try:
        fold(modules[source], touched[1:], torch.exp2(powers.float()).to(before[0].device))
        after = _outputs(layer, names, run)
    finally:
        for parameter, value in kept:
            parameter.copy_(value)
    return all(_same(a, b) for a, b in zip(after, before, strict=True))


def _outputs(layer: nn.Module, names: Sequence[str], run: Run) -> list[Tensor]:
    """Of the linears, and of the layer."""
    found: list[Tensor] = []
    hooks = [
        layer.get_submodule(name).register_forward_hook(lambda _, __, out: found.append(out))
        for name in names
    ]
    try:
        last = run()
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, last]


def _same(a: Tensor, b: Tensor) -> bool:
    """But for the rounding of sums that a kernel may take in another order."""
    noise = 4 * torch.finfo(b.dtype).eps * float(b.abs().max())
    return bool((a - b).abs().max() <= noise)
