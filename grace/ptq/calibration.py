"""Calibration inputs of decoder layers, one layer after another, on the device or beside it.

The model runs once over the batches, up to its last decoder layer, so that images, masks and
position embeddings are as they are in use. From then on layers run alone: a layer's inputs are the
outputs of the layers before it as they are *now*, quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a module


VALID = "valid_tokens"  # of a batch: bool [B, S], where its attention_mask does not say it


class Reached(Exception):
    """What was to be seen of a forward has been seen: the rest of it is left out."""


@dataclass
class Sample:
    """A batch on its way through the decoder.

    Attributes:
        hidden: input of the layer that comes next, [B, S, d].
        tokens: bool [B, S], which tokens are no padding; None: all of them.
        arguments: everything else that each layer is called with.
        added: what the model adds to the input of each layer, behind the layer before it (visual
            features of Qwen3-VL); None: nothing.
    """

    hidden: Tensor
    tokens: Tensor | None
    arguments: list[Inputs] = field(default_factory=list)
    added: list[Tensor | None] = field(default_factory=list)

    def rows(self, x: Tensor) -> Tensor:
        """Rows of x [B, S, K] that are no padding, [n, K]."""
        if self.tokens is None or x.shape[:-1] != self.tokens.shape:
            return x.reshape(-1, x.shape[-1])
        return x[self.tokens.to(x.device)]


class Calibration:
    """Samples, and the decoder layers that they run through.

    Args:
        model: the whole model; it runs once over every batch.
        layers: its decoder layers.
        batches: keyword arguments of the model's forward; labels are left out.
        memory_budget: bytes of hidden states that may stay on the device; more than that and they
            wait in the CPU's memory. None: a quarter of what the device has free.

    Raises:
        ValueError: no batches, one that is no mapping of arguments, one whose hidden states are not
            finite, a model that does not run its decoder layers in their order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        batches: Iterable[Mapping[str, Any]],
        memory_budget: int | None = None,
    ) -> None:
        self.layers = layers
        self.device = next(layers.parameters()).device
        self.dtype = next(layers.parameters()).dtype
        self.place = self.device
        budget = _budget(self.device) if memory_budget is None else memory_budget
        self.samples: list[Sample] = []
        for number, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                got = type(batch).__name__
                raise ValueError(f"ptq: batches must be mappings of model inputs, got {got}")
            self.samples.append(self._catch(model, batch, number))
            if self.place == self.device and self._bytes() > budget:
                self._wait_on_cpu()
        if not self.samples:
            raise ValueError("ptq: batches must hold something to calibrate with, got none")

    def inputs(self, sample: Sample, number: int) -> Inputs:
        """Arguments of layer ``number``, on its device."""
        args, kwargs = sample.arguments[number]
        return self.moved(((sample.hidden, *args), kwargs), self.device)

    def run(self, sample: Sample, number: int) -> Tensor:
        """Output of layer ``number``, [B, S, d]."""
        args, kwargs = self.inputs(sample, number)
        return first_tensor(self.layers[number](*args, **kwargs))

    def run_to(self, module: nn.Module, number: int, see: Callable[[Sample, Tensor], Any]) -> None:
        """Run layer ``number`` on every sample up to ``module`` in it, and show its input."""
        for sample in self.samples:

            def show(args: tuple, _: dict, sample: Sample = sample) -> None:
                see(sample, args[0])

            with hooked(module, show, stop=True):
                self.run(sample, number)

    def advance(self, number: int) -> None:
        """Every sample goes through layer ``number``."""
        for sample in self.samples:
            hidden = self.run(sample, number)
            if number + 1 < len(self.layers) and (more := sample.added[number + 1]) is not None:
                hidden = hidden + more.to(hidden.device)
            sample.hidden = hidden.to(self.place)

    def moved(self, tree: Any, device: torch.device) -> Any:
        """A tree of tensors on ``device``."""
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)

    def _catch(self, model: nn.Module, batch: Mapping[str, Any], number: int) -> Sample:
        """Run the model over a batch and keep what its decoder layers are called with."""
        calls: list[Inputs] = []
        outputs: list[Tensor] = []
        hooks = []
        for place, layer in enumerate(self.layers):
            hooks += _caught(layer, place, calls, outputs, last=place == len(self.layers) - 1)
        given = {name: value for name, value in batch.items() if name not in ("labels", VALID)}
        given = tree_map(self._as_model, given)
        try:
            with suppress(Reached):
                model(**given, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != len(self.layers):
            raise ValueError(
                f"ptq: model must run its {len(self.layers)} decoder layers in order, once each, "
                f"got {len(outputs)} of them"
            )
        valid = batch.get(VALID, batch.get("attention_mask"))
        sample = self._sample(calls, outputs, self._as_model(valid))
        if not all(bool(sample.rows(out).isfinite().all()) for out in outputs):
            raise ValueError(f"ptq: hidden states of batch {number} must be finite, got NaN or Inf")
        return sample

    def _as_model(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _sample(self, calls: list[Inputs], outputs: list[Tensor], mask: Any) -> Sample:
        sample = Sample(calls[0][0][0].to(self.place), _tokens(mask, outputs[0]))
        memory: dict[int, Tensor] = {}  # layers share masks and position embeddings: kept once

        def keep(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return memory.setdefault(id(x), x.to(self.place))

        for place, (args, kwargs) in enumerate(calls):
            sample.arguments.append(tree_map(keep, (args[1:], kwargs)))
            before = outputs[place - 1] if place else args[0]
            same = args[0] is before or torch.equal(args[0], before)
            sample.added.append(None if same else (args[0] - before).to(self.place))
        return sample

    def _bytes(self) -> int:
        # As the sample itself, another two of its size are in work while a layer runs.
        return 3 * sum(s.hidden.numel() * s.hidden.element_size() for s in self.samples)

    def _wait_on_cpu(self) -> None:
        self.place = torch.device("cpu")
        for sample in self.samples:
            sample.hidden = sample.hidden.to(self.place)
            sample.arguments = self.moved(sample.arguments, self.place)
            sample.added = self.moved(sample.added, self.place)


def first_tensor(output: Any) -> Tensor:
    """The output itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else tree_leaves(output)[0]


@contextmanager
def hooked(
    module: nn.Module, see: Callable[[tuple, dict], Any], *, stop: bool = False
) -> Iterator[None]:
    """Within the context, ``see`` gets the arguments of ``module``; with ``stop`` the context ends
    there, and what comes behind it does not run."""

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        see(args, kwargs)
        if stop:
            raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(Reached):
            yield
    finally:
        handle.remove()


def _caught(
    layer: nn.Module, place: int, calls: list[Inputs], outputs: list[Tensor], last: bool
) -> list[Any]:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(calls) != place:
            raise Reached  # out of order, which the caller tells of
        kwargs = dict(kwargs)
        hidden = args or (kwargs.pop("hidden_states"),)
        calls.append((hidden, kwargs))

    def after(_: nn.Module, __: tuple, output: Any) -> None:
        outputs.append(first_tensor(output))
        if last:
            raise Reached

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after),
    ]


def _tokens(mask: Any, hidden: Tensor) -> Tensor | None:
    """Tokens that are no padding, where the batch says it and has any."""
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:-1] or bool(mask.all()):
        return None
    return mask.bool()


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 62  # there is no other place
    return torch.cuda.mem_get_info(device)[0] // 4
