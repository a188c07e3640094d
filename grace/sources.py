"""Quantized checkpoints of other programs, one linear at a time: where its codes and scales are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grace.checkpoint import Checkpoint, read_json
from grace.formats import awq, compressed_tensors, gptq
from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import Unsupported, read_config

PUBLISHED_AWQ = "awq_quantized_modules.json"
PUBLISHED_CODES = "qat_quantized_weights.bin"
_ASYMMETRIC = {
    "weight_zero_point": "symmetric, without zero points",
    "weight_g_idx": "in order, without act-order (g_idx)",
}


class Source(ABC):
    """The quantized linears of a checkpoint.

    Attributes:
        checkpoint: where they are.
        method: their format's name in `grace.stored`; None: not words at all.
        parts: the tensors of a linear.
        stems: names of the linears, in files.
        half_scales: whether scales were stored in float16 because the format has nothing else.
        zero_offset: 1 where zero points are stored as they are, though GPTQ's are less 1.
    """

    method: str | None = None
    parts: tuple[str, ...] = ()
    half_scales = False
    zero_offset = 0

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        ending = f".{self.parts[0]}"
        self.stems = [n.removesuffix(ending) for n in checkpoint.tensors if n.endswith(ending)]

    def check(self, stem: str, name: str) -> None:  # noqa: B027 (most have nothing to say)
        """Requires that the linear called ``name`` in the model may be read.

        Raises:
            ValueError: it may not.
        """

    @abstractmethod
    def scheme(self, stem: str, name: str) -> Scheme:
        """Bits and group size of a linear.

        Raises:
            ValueError: the config says nothing of it.
        """

    @abstractmethod
    def read(self, stem: str, name: str) -> tuple[Tensor, Tensor]:
        """(codes int8 [N, K], scales [N, G]) of a linear.

        Raises:
            ValueError: tensors that are missing, do not fit the scheme, or are not symmetric.
        """

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of a linear, as they are stored."""
        found = self.checkpoint.tensors_of(f"{stem}.{part}" for part in self.parts)
        return {name.removeprefix(f"{stem}."): tensor for name, tensor in found.items()}


class CompressedTensors(Source):
    """compressed-tensors pack-quantized."""

    method = "compressed-tensors"
    parts = compressed_tensors.TENSORS

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.layout = read_config(config)
        super().__init__(checkpoint)

    def check(self, stem: str, name: str) -> None:
        """Refuses zero points and act-order, and a linear without all of its tensors."""
        for part, allowed in _ASYMMETRIC.items():
            if f"{stem}.{part}" in self.checkpoint.tensors:
                raise Unsupported(f"import: {stem} must be {allowed}, got {stem}.{part}")
        for part in self.parts:
            if f"{stem}.{part}" not in self.checkpoint.tensors:
                raise ValueError(f"import: src must hold {stem}.{part}, got no such tensor")

    def scheme(self, stem: str, name: str) -> Scheme:
        """As the config's targets say."""
        scheme = self.layout.scheme_of(name, ["Linear"])
        if scheme is None:
            raise ValueError(f"import: config must have a scheme for {name}, got none")
        return scheme

    def read(self, stem: str, name: str) -> tuple[Tensor, Tensor]:
        """As `grace.formats.compressed_tensors.decode`."""
        return compressed_tensors.decode(self.tensors(stem), self.scheme(stem, name), stem)


class Awq(Source):
    """AWQ in its GEMM layout."""

    method = awq.METHOD
    parts = awq.TENSORS
    half_scales = True

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._scheme = awq.read_config(config)
        super().__init__(checkpoint)

    def scheme(self, stem: str, name: str) -> Scheme:
        """The one of the config."""
        return self._scheme

    def read(self, stem: str, name: str) -> tuple[Tensor, Tensor]:
        """As `grace.formats.awq.decode`."""
        return awq.decode(self.tensors(stem), self._scheme, stem)


class Gptq(Source):
    """GPTQ, with zero points as either version stores them."""

    method = gptq.METHOD
    parts = gptq.TENSORS
    half_scales = True

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.settings = gptq.read_config(config)
        self.zero_offset = int(self.settings.zero == 2 ** (self.settings.scheme.bits - 1))
        super().__init__(checkpoint)

    def scheme(self, stem: str, name: str) -> Scheme:
        """The one of the config."""
        return self.settings.scheme

    def read(self, stem: str, name: str) -> tuple[Tensor, Tensor]:
        """As `grace.formats.gptq.decode`."""
        return gptq.decode(self.tensors(stem), self.settings, stem)


class PublishedAwq(Awq):
    """AWQ tensors whose settings and names are in a list beside them, not in config.json."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        listed = read_json(checkpoint.directory / PUBLISHED_AWQ)
        super().__init__(checkpoint, listed)
        names = listed.get("modules")
        if not isinstance(names, list) or set(names) != set(self.stems):
            odd = sorted({*self.stems} ^ {*map(str, names or ())})
            raise ValueError(
                f"import: {PUBLISHED_AWQ} must list the quantized linears of the checkpoint, "
                f"got {len(odd)} in one of them only, as {odd[:1]}"
            )


class PublishedCodes(Source):
    """Dense weights rounded from the grid, with the grid's log-scales in a pickle beside them.

    A code is w / exp(log_scale), rounded: exact, as ``code · scale`` rounded once to bfloat16 is
    off by far less than half a scale. Each is multiplied out again and compared.
    """

    parts = ("weight",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._grid = _read_pickle(checkpoint)
        names = [name for name in self._grid if name.endswith(".log_scale")]
        self.stems = [name.removesuffix(".log_scale") for name in names]

    def scheme(self, stem: str, name: str) -> Scheme:
        """Group size by the number of log-scales; 4 bits unless any linear has larger codes."""
        codes, scales = self._divide(stem)
        return Scheme(self._bits, codes.shape[1] // scales.shape[1])

    @cached_property
    def _bits(self) -> int:
        ranges = (self._divide(stem)[0].aminmax() for stem in self.stems)
        return 4 if all(low >= -8 and high <= 7 for low, high in ranges) else 8

    def read(self, stem: str, name: str) -> tuple[Tensor, Tensor]:
        """Codes, and float32 scales.

        Raises:
            ValueError: weights that are not code times scale.
        """
        codes, scales = self._divide(stem)
        weight = self._weight(stem)
        product = (codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)
        fits = float(codes.min()) >= -128 and float(codes.max()) <= 127
        if not fits or not torch.equal(product.to(weight.dtype), weight):
            raise ValueError(f"import: {stem}.weight must lie on its log_scale's grid, got others")
        return codes.to(torch.int8), scales

    def _divide(self, stem: str) -> tuple[Tensor, Tensor]:
        weight, log_scale = self._weight(stem).float(), self._grid[f"{stem}.log_scale"]
        rows, columns = weight.shape
        count = log_scale.numel()
        if not count or count % rows or columns % (count // rows):
            raise ValueError(
                f"import: {stem}.log_scale must have one entry a group of [{rows}, {columns}], "
                f"got {count}"
            )
        scales = log_scale.double().exp().float().view(rows, -1)
        codes = (weight.unflatten(1, (scales.shape[1], -1)) / scales.unsqueeze(-1)).round()
        return codes.flatten(1), scales

    def _weight(self, stem: str) -> Tensor:
        found = self.checkpoint.tensors_of([f"{stem}.weight"])
        if not found:
            raise ValueError(f"import: src must hold {stem}.weight, got no such tensor")
        return found[f"{stem}.weight"]


def _read_pickle(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The grid: a plain dict of tensors, read without running what a pickle may hold."""
    import pickle

    file = checkpoint.directory / PUBLISHED_CODES
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"import: {file.name} must hold tensors alone, got: {first}") from None
    good = isinstance(content, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )
    if not good or not any(name.endswith(".log_scale") for name in content):
        raise ValueError(f"import: {file.name} must hold log_scale tensors by name, got none")
    return content


def recognise(checkpoint: Checkpoint) -> Source:
    """The kind of checkpoint this is, by its config and the files beside it.

    Raises:
        Unsupported: a config that asks for what packed layers cannot hold.
        ValueError: none that is known.
    """
    config = checkpoint.config.get("quantization_config")
    if config is None and (checkpoint.directory / PUBLISHED_AWQ).is_file():
        return PublishedAwq(checkpoint)
    if config is None and (checkpoint.directory / PUBLISHED_CODES).is_file():
        return PublishedCodes(checkpoint)
    method = config.get("quant_method") if isinstance(config, dict) else None
    kinds: dict[Any, Any] = {
        "compressed-tensors": CompressedTensors,
        awq.METHOD: Awq,
        gptq.METHOD: Gptq,
    }
    if method not in kinds:
        hint = "; a model in training is for grace export" if method == "grace" else ""
        raise ValueError(
            "import: src must be quantized by compressed-tensors, awq or gptq, or hold "
            f"{PUBLISHED_AWQ} or {PUBLISHED_CODES}, got {method}{hint}"
        )
    return kinds[method](checkpoint, config)
