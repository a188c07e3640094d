"""The GPTQ format, version 1: four tensors a linear, 4 or 8 bits.

A linear ``[N, K]`` of ``b`` bits in groups of ``g`` is stored as

    qweight  int32 [K·b/32, N]    codes + 2^(b-1) of neighbouring inputs, the first in the low bits
    qzeros   int32 [K/g, N·b/32]  zero points less 1: 2^(b-1) - 1 where codes are symmetric
    scales   float16 [K/g, N]
    g_idx    int32 [K]            the group of each input: k // g without act-order

Version 2 (``checkpoint_format: gptq_v2``) stores zero points as they are; it is read, not written.
Format: https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace.formats.compressed_tensors import BITS, Scheme
from grace.formats.compressed_tensors_config import Unsupported
from grace.formats.ignored import one_scheme, patterns
from grace.formats.words import (
    check_tensors,
    exact_half,
    from_words,
    offset_of,
    signed_of,
    to_words,
)
from grace.version import __version__

METHOD = "gptq"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


class Settings(NamedTuple):
    """What a config says of all quantized linears."""

    scheme: Scheme
    zero: int  # what symmetric codes have in qzeros
    ordered: bool  # whether groups may be in the order of activations


def encode(codes: Tensor, scales: Tensor, scheme: Scheme, name: str) -> dict[str, Tensor]:
    """The four tensors of the format for ``codes`` int8 [N, K] and ``scales`` [N, G].

    Raises:
        ValueError: sizes that do not fill words, scales that float16 rounds.
    """
    rows, columns = codes.shape
    expected = shapes(rows, columns, scheme, name)
    zeros = torch.full((expected["qzeros"][0], rows), 2 ** (scheme.bits - 1) - 1, dtype=torch.uint8)
    return {
        "qweight": to_words(offset_of(codes.contiguous(), scheme.bits), scheme.bits)
        .t()
        .contiguous(),
        "qzeros": to_words(zeros, scheme.bits).to(codes.device),
        "scales": exact_half(METHOD, scales, name).t().contiguous(),
        "g_idx": _groups(columns, scheme).to(codes.device),
    }


def decode(tensors: dict[str, Tensor], settings: Settings, name: str) -> tuple[Tensor, Tensor]:
    """The exact inverse of `encode`: (codes int8 [N, K], scales [N, G]).

    Raises:
        Unsupported: zero points of asymmetric codes, groups in the order of activations.
        ValueError: a tensor of another shape or dtype than the scheme's.
    """
    scheme = settings.scheme
    if "qweight" not in tensors or tensors["qweight"].dim() != 2:
        raise ValueError(f"gptq: {name}.qweight must be [K·b/32, N], got none")
    words, rows = tensors["qweight"].shape
    columns = words * 32 // scheme.bits
    expected = shapes(rows, columns, scheme, name)
    if "g_idx" not in tensors and not settings.ordered:
        expected.pop("g_idx")
    check_tensors(METHOD, tensors, expected, name)
    if "g_idx" in expected and not torch.equal(tensors["g_idx"], _groups(columns, scheme)):
        raise Unsupported(
            f"gptq: g_idx of {name} must be k // group_size (no act-order), got another order"
        )
    if not bool((from_words(tensors["qzeros"], scheme.bits) == settings.zero).all()):
        raise Unsupported(
            f"gptq: zero points of {name} must all be {settings.zero} (symmetric), got others"
        )
    values = from_words(tensors["qweight"].t(), scheme.bits)
    return signed_of(values, scheme.bits), tensors["scales"].t().contiguous()


def shapes(rows: int, columns: int, scheme: Scheme, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the four tensors of a weight ``[rows, columns]``.

    Raises:
        ValueError: bits other than 4 and 8, sizes that do not divide.
    """
    if scheme.bits not in BITS:
        raise ValueError(f"gptq: bits of {name} must be 4 or 8, got {scheme.bits}")
    size, per_word = columns if scheme.group_size == -1 else scheme.group_size, 32 // scheme.bits
    if size < 1 or columns % size or rows % per_word or columns % per_word:
        raise ValueError(
            f"gptq: {name} must have outputs and inputs that {per_word} divides, and inputs that "
            f"its group size divides, got [{rows}, {columns}] and {scheme.group_size}"
        )
    groups = columns // size
    return {
        "qweight": (columns // per_word, rows),
        "qzeros": (groups, rows // per_word),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }


def _groups(columns: int, scheme: Scheme) -> Tensor:
    size = columns if scheme.group_size == -1 else scheme.group_size
    return torch.arange(columns, dtype=torch.int32) // size


def make_config(quantized: Mapping[str, Scheme], other: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint; arguments as for compressed-tensors.

    What is not quantized is named by ``dynamic``, whose patterns with ``-:`` vLLM, SGLang and
    GPTQModel skip.

    Raises:
        ValueError: no linear, or unlike ones.
    """
    scheme = one_scheme(METHOD, quantized, other)
    return {
        "quant_method": METHOD,
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "dynamic": {f"-:{pattern}": {} for pattern in patterns(other, quantized)},
        "meta": {"quantizer": [f"grace:{__version__}"]},
    }


def read_config(config: Mapping[str, Any]) -> Settings:
    """Scheme of every quantized linear, and how zero points are stored.

    Raises:
        Unsupported: asymmetric, another checkpoint format, bits, or settings by module.
    """
    if config.get("sym", True) is not True:
        raise Unsupported(f"gptq: sym must be true, got {config['sym']}")
    kind = str(config.get("checkpoint_format") or "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise Unsupported(f"gptq: checkpoint_format must be gptq or gptq_v2, got {kind}")
    if own := [key for key in config.get("dynamic") or {} if not key.startswith("-:")]:
        raise Unsupported(f"gptq: dynamic must only skip modules (-:), got {own[0]}")
    bits, size = config.get("bits"), config.get("group_size")
    if bits not in BITS:
        raise Unsupported(f"gptq: bits must be 4 or 8, got {bits}")
    if not isinstance(size, int) or (size != -1 and size < 1):
        raise Unsupported(f"gptq: group_size must be -1 or positive, got {size}")
    zero = 2 ** (bits - 1) - (kind == "gptq")
    return Settings(Scheme(bits, size), zero, bool(config.get("desc_act")))
