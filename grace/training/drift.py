"""How far quantization moves in training: codes that flip and scales that drift, by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from grace.training.sharding import first_rows

_SAMPLE = 2**16  # weights of a layer that are looked at: codes of a whole model cost a byte each
_LAYER = re.compile(r"\blayers\.(\d+)\.")
FLIPS, DRIFT = "code_flip_rate", "scale_drift"


class CodeDrift(TrainerCallback):
    """Two numbers of the quantized layers, as a whole and by decoder layer.

        code_flip_rate   share of codes that changed since the last look
        scale_drift      mean |θ − θ₀| of the log-scales, θ₀ those the model was given with

    It looks at the same first rows of every layer, about `sample` weights. Of a sharded model each
    rank looks at those of them that it holds; the counts are added up over ranks.

    Args:
        model: the student, before it is sharded and before a checkpoint is loaded into it.
        sample: weights of a layer that are looked at, at least one row.
    """

    def __init__(self, model: nn.Module, sample: int = _SAMPLE) -> None:
        from grace.nn import FakeQuantLinear

        self.sample = sample
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)]
        self.layers = [layer for _, layer in named]
        found = [_LAYER.search(name) for name, _ in named]
        self.depth = [int(match[1]) if match else 0 for match in found]
        self.first = [
            layer.log_scale.detach()[: self._rows(layer)].clone() for layer in self.layers
        ]
        self.codes: list[Tensor] = []

    def _rows(self, layer: Any) -> int:
        return max(1, self.sample // layer.in_features)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Look at the codes that training starts from."""
        self.codes = list(self._codes())

    def rates(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The two numbers, and `<name>/layer_<i>` of each decoder layer; {} without layers.

        Args:
            reduce: sums a tensor over ranks; called once, on every rank.
        """
        if not self.layers:
            return {}
        codes, before = list(self._codes()), self.codes
        found = [
            self._counts(index, new, old)
            for index, (new, old) in enumerate(zip(codes, before or codes, strict=True))
        ]
        self.codes = codes
        counts = torch.zeros(max(self.depth) + 1, 4, dtype=torch.float64, device=found[0].device)
        depth = torch.tensor(self.depth, device=counts.device)
        return _rates(reduce(counts.index_add_(0, depth, torch.stack(found))).cpu())

    @torch.no_grad()
    def _counts(self, index: int, new: Tensor, old: Tensor) -> Tensor:
        """Of a layer: codes that changed, codes, Σ |θ − θ₀|, log-scales; float64 [4]."""
        layer, first = self.layers[index], self.first[index]
        now, start = first_rows(layer.log_scale, len(first))
        drift = (now - first[start : start + len(now)].to(now.device)).abs().sum()
        numbers = [(new != old).sum(), new.numel(), drift, now.numel()]
        return torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=now.device) for n in numbers]
        )

    @torch.no_grad()
    def _codes(self) -> Iterator[Tensor]:
        from grace.ops.fake_quant import quantize

        for layer in self.layers:
            weight, _ = first_rows(layer.weight, self._rows(layer))
            log_scale, _ = first_rows(layer.log_scale, self._rows(layer))
            codes, _ = quantize(
                weight,
                log_scale,
                bits=layer.bits,
                group_size=layer.group_size,
                scale_dtype=layer.scale_dtype,
            )
            yield codes


def _rates(counts: Tensor) -> dict[str, float]:
    flips, codes, drift, scales = counts.sum(0).tolist()
    rates = {FLIPS: flips / max(1, codes), DRIFT: drift / max(1, scales)}
    for depth, (flips, codes, drift, scales) in enumerate(counts.tolist()):
        rates[f"{FLIPS}/layer_{depth}"] = flips / max(1, codes)
        rates[f"{DRIFT}/layer_{depth}"] = drift / max(1, scales)
    return rates
