"""`grace.ptq.quantize`: round-to-nearest, GPTQ or AWQ on a model's decoder linears."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from grace import quantization
from grace.log_scale import METHODS as INITS
from grace.ptq import awq
from grace.ptq.calibration import Calibration, Sample
from grace.ptq.gptq import Hessian, solve
from grace.ptq.grid import AsymmetricGrid, Grid, install
from grace.ptq.structure import groups, with_source

METHODS = ("rtn", "gptq", "awq")
Advance = Callable[[str], Any]  # told the name of every linear that is done


def quantize(
    model: nn.Module,
    method: str = "rtn",
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = torch.bfloat16,
    symmetric: bool = True,
    skip: Sequence[str] | str | None = None,
    init: str = "mse",
    damping: float = 0.01,
    act_order: bool = False,
    memory_budget: int | None = None,
    progress: bool | Callable[[int, int], Any] = True,
) -> list[str]:
    """Quantizes the linears of the language model's decoder layers after training, in place.

    They are those of `grace.quantize` and become `FakeQuantLinear`, whose fake-quantized weight is
    the method's result: `grace.pack` and `grace.export` take the model as it is. Layers are
    quantized from the first to the last, each on what the layers before it give when they are
    quantized themselves. The same model and batches give the same result.

    Args:
        model: a causal or vision-language model of transformers. With ``gptq`` and ``awq`` its
            weights change; so do, with ``awq``, the norms that scales are folded into.
        method: "rtn": round to nearest; "gptq": `grace.ptq.gptq`; "awq": `grace.ptq.awq`.
        batches: keyword arguments of the model's forward, images among them, to calibrate with;
            labels are left out, padding does not count: zeros of ``attention_mask`` [B, S] or of
            ``valid_tokens`` [B, S], which the model does not get. Not for rtn.
        bits: 2 to 8.
        group_size: columns that share a scale; -1: a whole row.
        scale_dtype: grid of the scales; None keeps them float32.
        symmetric: False gives every group a zero point, as GPTQ and AWQ have as published. Nothing
            here packs or serves that: linears stay what they are, with weights on that grid.
        skip: regexes; a linear whose name one of them finds stays as it is.
        init: how scales are found, a method of `grace.init_log_scale`; "mse" or "absmax" of an
            asymmetric grid.
        damping: GPTQ's, over the mean diagonal of the Hessian.
        act_order: GPTQ rounds columns with the largest inputs first; codes keep their order.
        memory_budget: bytes of calibration that may stay on the model's device (`Calibration`).
        progress: a bar with the time left, or what is told (linears done, of how many).

    Returns:
        Names of the linears that are quantized.

    Raises:
        ValueError: a method, bits, group size or damping that is not allowed, or no batches where
            they are needed; the model is then unchanged. Also calibration inputs that are not
            finite; where that is found behind the first layer, layers before it are quantized.
    """
    kind = Grid if symmetric else AsymmetricGrid
    grid = kind(bits, group_size, scale_dtype, init)
    _check(method, batches, grid, damping, act_order)
    common = {"bits": bits, "group_size": group_size, "scale_dtype": scale_dtype, "init": init}
    names = list(quantization.layer_settings(model, common, skip))
    if method == "rtn" and symmetric:
        settings: dict[str, Any] = {"skip": skip, "scale_dtype": scale_dtype, "init": init}
        return quantization.quantize(model, bits, group_size, **settings)
    if method == "rtn":
        for name in names:
            _round(cast(nn.Linear, model.get_submodule(name)), grid)
        return names
    assert batches is not None
    prefix, layers = quantization.decoder_layers(model)
    with torch.no_grad(), _evaluating(model), _told(progress, method, len(names)) as advance:
        calibration = Calibration(model, layers, batches, memory_budget)
        for number in range(len(layers)):
            start = f"{prefix}.{number}."
            chosen = [n.removeprefix(start) for n in names if n.startswith(start)]
            layer = _Layer(calibration, number, chosen, grid, start, advance)
            if method == "gptq":
                layer.gptq(damping, act_order)
            else:
                layer.awq()
            if number + 1 < len(layers):
                calibration.advance(number)
    if symmetric:
        quantization.record(model)
    return names


@torch.no_grad()
def _round(linear: nn.Linear, grid: Grid) -> None:
    weight = linear.weight.float()
    linear.weight.copy_(grid.nearest(weight, grid.find(weight)))


def _check(method: str, batches: Any, grid: Grid, damping: float, act_order: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"ptq: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method != "rtn" and batches is None:
        raise ValueError(f"ptq: {method} must have batches to calibrate with, got none")
    if grid.init not in INITS:
        raise ValueError(f"ptq: init must be one of {', '.join(INITS)}, got {grid.init!r}")
    if isinstance(grid, AsymmetricGrid) and grid.init == "p99":
        raise ValueError("ptq: init must be mse or absmax of an asymmetric grid, got 'p99'")
    if not 0 < damping < float("inf"):
        raise ValueError(f"ptq: damping must be above 0, got {damping}")
    if act_order and method != "gptq":
        raise ValueError(f"ptq: act_order must be of gptq, got it with {method}")


class _Layer:
    """One decoder layer to be quantized.

    Args:
        calibration: at this layer.
        number: of the layer.
        chosen: names of the linears to quantize, within the layer.
        grid: what they are quantized to.
        prefix: what their names begin with in the model, for messages.
        advance: told of every linear.
    """

    def __init__(
        self,
        calibration: Calibration,
        number: int,
        chosen: Sequence[str],
        grid: Grid,
        prefix: str,
        advance: Advance,
    ) -> None:
        self.calibration, self.number, self.grid = calibration, number, grid
        self.layer = calibration.layers[number]
        self.chosen, self.prefix, self.advance = chosen, prefix, advance
        self._done: set[str] = set()

    def gptq(self, damping: float, act_order: bool) -> None:
        """Group after group, each on what the groups before it give when they are quantized."""
        for group in groups(self.layer, self._run_first):
            names = [name for name in group.names if name in self.chosen]
            if not names:
                continue
            first = self._linear(group.names[0])
            hessian = Hessian(first.in_features, self.calibration.device)

            def see(sample: Sample, x: Tensor, hessian: Hessian = hessian) -> None:
                hessian.add(sample.rows(x))

            self.calibration.run_to(first, self.number, see)
            matrix = hessian.matrix(self.prefix + group.names[0])
            for name in names:
                codes, log_scale = solve(
                    self._linear(name).weight, matrix, self.grid,
                    damping=damping, act_order=act_order,
                )  # fmt: skip
                self._install(name, codes.float(), log_scale)
        self._round_the_rest()

    def awq(self) -> None:
        """Scales of all groups first, then clipping and rounding."""
        found = [
            with_source(self.layer, group, self._run_first)
            for group in groups(self.layer, self._run_first)
        ]
        seen = awq.observe(self.calibration, self.number, found)
        for group, observed in seen.items():
            observed.hessian.matrix(self.prefix + group.names[0])  # finite, or it is told
            names = [name for name in group.names if name in self.chosen]
            if group.source is not None and names:
                searched = awq.search_scale(
                    self.layer, group, observed, self.grid, names, self.calibration.device
                )
                awq.apply_scale(self.layer, group, observed, searched.scale)
        for group, observed in seen.items():
            hessian = observed.hessian.matrix(self.prefix + group.names[0])
            for name in group.names:
                if name in self.chosen:
                    self._install(
                        name, None, awq.clip(self._linear(name).weight, hessian, self.grid)
                    )
        self._round_the_rest()

    def _run_first(self) -> Tensor:
        return self.calibration.run(self.calibration.samples[0], self.number)

    def _linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.layer.get_submodule(name))

    def _install(self, name: str, codes: Tensor | None, log_scale: Tensor) -> None:
        """Put the result in place: codes times scales, or what is nearest to the weight."""
        linear = self._linear(name)
        quantized = (
            self.grid.nearest(linear.weight.float(), log_scale)
            if codes is None
            else self.grid.product(codes, log_scale)
        )
        if isinstance(self.grid, AsymmetricGrid):
            with torch.no_grad():
                linear.weight.copy_(quantized)
        else:
            self.layer.set_submodule(name, install(linear, quantized, log_scale, self.grid))
        self._done.add(name)
        self.advance(self.prefix + name)

    def _round_the_rest(self) -> None:
        """Linears that the first batch did not run through."""
        for name in self.chosen:
            if name not in self._done:
                told = f"ptq: {self.prefix}{name} saw no calibration and is rounded to nearest"
                warnings.warn(told, stacklevel=2)
                self._install(name, None, self.grid.find(self._linear(name).weight))


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _told(progress: bool | Callable[[int, int], Any], method: str, total: int) -> Any:
    """A function to be told of every linear that is done."""
    done = 0
    shown = tqdm(total=total, desc=method, unit="linear", disable=progress is not True)

    def advance(name: str) -> None:
        nonlocal done
        done += 1
        shown.update()
        if callable(progress):
            progress(done, total)

    with shown:
        yield advance
