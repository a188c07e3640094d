"""The formats that `grace.export` writes, by name: how each stores a linear, and its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grace.formats import awq, compressed_tensors, compressed_tensors_config, gptq
from grace.formats.compressed_tensors import Scheme


@dataclass(frozen=True)
class Layout:
    """One format: its tensors of a linear, and the functions that make them and its config."""

    name: str
    tensors: tuple[str, ...]
    scales: str  # which of the tensors holds the scales
    encode: Callable[[Tensor, Tensor, Scheme, str], dict[str, Tensor]]
    make_config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]


def _compressed(codes: Tensor, scales: Tensor, scheme: Scheme, name: str) -> dict[str, Tensor]:
    return compressed_tensors.encode(codes, scales, scheme.bits)


COMPRESSED = Layout(
    compressed_tensors_config.METHOD,
    compressed_tensors.TENSORS,
    "weight_scale",
    _compressed,
    compressed_tensors_config.make_config,
)
AWQ = Layout(awq.METHOD, awq.TENSORS, "scales", awq.encode, awq.make_config)
GPTQ = Layout(gptq.METHOD, gptq.TENSORS, "scales", gptq.encode, gptq.make_config)
LAYOUTS = {layout.name: layout for layout in (COMPRESSED, AWQ, GPTQ)}
