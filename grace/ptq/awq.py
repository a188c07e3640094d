"""AWQ: channels with large inputs get finer steps, by scales that cancel in the layer before.

For a group of linears W that read x, and a scale s a channel of x, W·diag(s) is quantized and x/s
read in its place; the division is folded into the norm or linear that makes x. Of

    s = mean|x|^α, over √(max s · min s)          α = 0, 1/20, … 19/20

the one whose quantized block (attention, MLP, or the linear itself) is nearest to the block as it
was on the calibration inputs is taken; α = 0 is no scaling at all. Then the scale of every group of
columns is searched again, clipping what lies outside, for the least δ H δᵀ, H = 2/n Σ x xᵀ.
Source: Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration" (MLSys 2024), sections 3.2 and its weight clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from grace.ptq.calibration import Calibration, Inputs, Sample, first_tensor, hooked
from grace.ptq.gptq import Hessian, output_error
from grace.ptq.grid import Grid, each
from grace.ptq.structure import Group, fold

RATIOS = tuple(step / 20 for step in range(20))  # α
CLIPS = tuple(percent / 100 for percent in range(40, 122, 2))  # scales, of absmax / Qp
_CHUNK = 1 << 24  # numbers in work at once while scales are searched


@dataclass
class Observed:
    """What a group's linears were given: their Hessian, and, for a group of several, every call of
    the block that holds them."""

    hessian: Hessian
    calls: list[tuple[Sample, Inputs]] = field(default_factory=list)


def observe(
    calibration: Calibration, number: int, groups: Iterable[Group]
) -> dict[Group, Observed]:
    """One run of every sample through layer ``number``, watched."""
    layer, seen = calibration.layers[number], {}
    for group in groups:
        columns = _linear(layer, group.names[0]).in_features
        seen[group] = Observed(Hessian(columns, calibration.device))
    for sample in calibration.samples:
        with ExitStack() as hooks:
            for group, observed in seen.items():
                _watch(hooks, layer, calibration, group, observed, sample)
            calibration.run(sample, number)
    return seen


def _watch(
    hooks: ExitStack,
    layer: nn.Module,
    calibration: Calibration,
    group: Group,
    observed: Observed,
    sample: Sample,
) -> None:
    def inputs(args: tuple, _: dict) -> None:
        observed.hessian.add(sample.rows(args[0]))

    def call(args: tuple, kwargs: dict) -> None:
        observed.calls.append((sample, calibration.moved((args, kwargs), calibration.place)))

    hooks.enter_context(hooked(layer.get_submodule(group.names[0]), inputs))
    if group.source is not None and len(group.names) > 1:
        hooks.enter_context(hooked(layer.get_submodule(group.block), call))


@dataclass(frozen=True)
class Searched:
    """The outcome of a search: the scales [K], and the error with them and without any."""

    scale: Tensor
    error: float
    plain_error: float


@torch.no_grad()
def search_scale(
    layer: nn.Module,
    group: Group,
    observed: Observed,
    grid: Grid,
    selected: Iterable[str],
    device: torch.device,
) -> Searched:
    """The best s of a group; the layer is as it was when this returns.

    Args:
        layer: the decoder layer.
        group: with a source.
        observed: of `observe`.
        grid: bits, groups, scales.
        selected: which of the group's linears are to be quantized.
        device: of the layer.
    """
    linears = {name: _linear(layer, name) for name in selected}
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    error = _objective(layer, group, observed, linears, weights, device)
    mean = observed.hessian.mean_absolute()
    tried: list[tuple[float, Tensor]] = []
    try:
        for ratio in RATIOS:
            scale = _scale(mean, ratio)
            for name, linear in linears.items():
                scaled = weights[name].float() * scale
                linear.weight.copy_(grid.nearest(scaled, grid.find(scaled)) / scale)
            tried.append((error(), scale))
    finally:
        for name, linear in linears.items():
            linear.weight.copy_(weights[name])
    best = min(tried, key=lambda item: item[0])
    return Searched(best[1], best[0], tried[0][0])


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(name))


def _scale(mean: Tensor, ratio: float) -> Tensor:
    """s of an α; 1 for channels that nothing came through."""
    seen = mean > 0
    if ratio == 0 or not bool(seen.any()):
        return torch.ones_like(mean)
    scale = mean.clamp_min(1e-4).pow(ratio)
    scale = scale / (scale[seen].max() * scale[seen].min()).sqrt()
    return torch.where(seen, scale, 1.0)


def _objective(
    layer: nn.Module,
    group: Group,
    observed: Observed,
    linears: dict[str, nn.Linear],
    weights: dict[str, Tensor],
    device: torch.device,
) -> Callable[[], float]:
    """The error of the group's block with the weights that its linears have when it is called."""
    if not observed.calls:
        hessian = observed.hessian.matrix(group.names[0])

        def of_outputs() -> float:
            differences = (linears[name].weight.float() - weights[name].float() for name in linears)
            return float(sum(output_error(d, hessian).sum() for d in differences))

        return of_outputs
    block = layer.get_submodule(group.block)
    wanted = [
        _output(block, sample, call, device).to(sample.hidden.device)  # where samples wait
        for sample, call in observed.calls
    ]

    def of_block() -> float:
        total = torch.zeros((), device=device, dtype=torch.float64)
        for (sample, call), exact in zip(observed.calls, wanted, strict=True):
            found = _output(block, sample, call, device).float()
            total += (found - exact.to(device)).square().sum()
        return float(total)

    return of_block


def _output(block: nn.Module, sample: Sample, call: Inputs, device: torch.device) -> Tensor:
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, Tensor) else x, call
    )
    return sample.rows(first_tensor(block(*args, **kwargs)))


def apply_scale(layer: nn.Module, group: Group, observed: Observed, scale: Tensor) -> None:
    """Fold ``scale`` into the group's source, its linears, and what was observed of its inputs."""
    assert group.source is not None
    linears = [layer.get_submodule(name) for name in group.names]
    fold(layer.get_submodule(group.source), linears, scale)
    observed.hessian.sum /= scale.outer(scale)
    observed.hessian.absolute /= scale
    observed.calls.clear()


@torch.no_grad()
def clip(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Log-scales float32 [N, G] (steps of the grid) of least δ H δᵀ, each group for itself.

    A row for which `Grid.find` is better, all its groups together, has that one's.

    Args:
        weight: [N, K].
        hessian: [K, K] float32.
        grid: bits, groups, scales.
    """
    size = grid.columns(weight)
    blocks = torch.stack(
        [hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)]
    )
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    found = [_clip(part.float(), blocks, grid) for part in weight.split(rows)]
    clipped, plain = torch.cat(found), grid.find(weight)
    full = weight.float()
    errors = [output_error(grid.nearest(full, x) - full, hessian) for x in (clipped, plain)]
    return torch.where((errors[0] <= errors[1]).unsqueeze(1), clipped, plain)


def _clip(weight: Tensor, blocks: Tensor, grid: Grid) -> Tensor:
    """Steps of ``weight`` [n, K] by the diagonal ``blocks`` [G, g, g] of H."""
    grouped = weight.unflatten(1, (blocks.shape[0], -1))
    best = torch.zeros_like(grid.clipped(grouped, 1.0))
    least = torch.full_like(grouped[..., 0], torch.inf)
    for ratio in CLIPS:
        steps = grid.clipped(grouped, ratio)
        difference = (grid.nearest(weight, steps) - weight).view_as(grouped).transpose(0, 1)
        error = (difference @ blocks * difference).sum(-1).t()
        best = torch.where(each(error < least, steps), steps, best)
        least = torch.where(error < least, error, least)
    return best
