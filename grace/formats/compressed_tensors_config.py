"""The ``quantization_config`` of compressed-tensors ``pack-quantized`` checkpoints: made and read.

A config names *targets* (class names, module names, or ``re:`` patterns) with their scheme, and
what to *ignore*. Patterns are matched at the beginning of a module's name, as `re.match` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grace.formats.compressed_tensors import BITS, Scheme

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


class Unsupported(ValueError):
    """A valid compressed-tensors config that asks for something `grace` does not run."""


def make_config(quantized: Mapping[str, Scheme], other: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint.

    Args:
        quantized: name of every packed linear, with its scheme.
        other: names of all linears that stay as they are.

    Raises:
        ValueError: no packed linear, or unlike ones in what servers fuse (q/k/v, gate/up).
    """
    if not quantized:
        raise ValueError("compressed-tensors: a checkpoint must have quantized linears, got none")
    check_fused("compressed-tensors", quantized, other)
    schemes = list(dict.fromkeys(quantized.values()))
    schemes.sort(key=list(quantized.values()).count, reverse=True)
    groups = {}
    for index, scheme in enumerate(schemes):
        names = [name for name, own in quantized.items() if own == scheme]
        rest = [name for name, own in quantized.items() if own != scheme]
        # Name patterns win over the class name, so the commonest scheme may take all that is left.
        targets = ["Linear"] if index == 0 else name_patterns(names, rest)
        groups[f"group_{index}"] = _group(scheme, targets)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": name_patterns(other, quantized),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    by_row = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def check_fused(layout: str, quantized: Mapping[str, Scheme], other: Iterable[str]) -> None:
    """Servers load q/k/v and gate/up as one matrix each, so its parts must have one scheme.

    Raises:
        ValueError: parts of one matrix with unlike schemes.
    """
    schemes: dict[str, Scheme | None] = {**dict.fromkeys(other), **quantized}
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in (name for name in quantized if name.endswith(parts)):
            parent = name.rpartition(".")[0]
            siblings = [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in schemes]
            if any(schemes[sibling] != schemes[name] for sibling in siblings):
                raise ValueError(
                    f"{layout}: {', '.join(parts)} must share bits and group size, "
                    f"got {', '.join(f'{s}: {schemes[s]}' for s in siblings)}"
                )


def name_patterns(names: Iterable[str], spared: Iterable[str]) -> list[str]:
    """Few ``re:`` patterns that match all of ``names`` and none of ``spared``.

    Patterns, because servers rename modules: they begin anywhere and end in a part of the name that
    tells the two sets apart, the highest container without a spared module (``re:.*visual.*``).
    """
    spared = list(spared)
    patterns: dict[str, None] = {}
    for name in names:
        if not any(re.match(pattern[3:], name) for pattern in patterns):
            patterns[_pattern(name, spared)] = None
    return list(patterns)


def _pattern(name: str, spared: Sequence[str]) -> str:
    parts = name.split(".")
    depth = next(
        (d for d in range(1, len(parts)) if not any_inside(".".join(parts[:d]), spared)),
        len(parts),
    )
    endings = (".*", r"\..*") if depth < len(parts) else ("", "$")
    for begin in range(depth - 1, -1, -1):
        for ending in endings:
            pattern = ".*" + re.escape(".".join(parts[begin:depth])) + ending
            if not any(re.match(pattern, other) for other in spared):
                return "re:" + pattern
    return "re:^" + re.escape(".".join(parts[:depth])) + endings[-1]


def any_inside(container: str, names: Sequence[str]) -> bool:
    """Whether a module of ``names`` lies in ``container``."""
    return any(name.startswith(container + ".") for name in names)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's ``quantization_config`` says: which linears are packed, and how."""

    targets: Mapping[str, Scheme]
    ignore: Sequence[str]

    def scheme_of(self, name: str, class_names: Sequence[str]) -> Scheme | None:
        """Scheme of the module ``name`` whose class and bases are ``class_names``; None: dense."""
        if any(_matches(entry, name, class_names) for entry in self.ignore):
            return None
        # Exact names before patterns before class names: the order of compressed-tensors itself.
        ordered = sorted(self.targets, key=lambda target: (target.startswith("re:"), target))
        by_name = [target for target in ordered if _matches(target, name, ())]
        by_class = [target for target in ordered if target in class_names]
        found = (by_name + by_class)[:1]
        return self.targets[found[0]] if found else None


def _matches(entry: str, name: str, class_names: Sequence[str]) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name or entry in class_names


def read_config(config: Mapping[str, Any]) -> Layout:
    """Reads a ``quantization_config``.

    Raises:
        Unsupported: it is not pack-quantized, symmetric, weight-only, 4 or 8 bits by group or row.
    """
    _expect(config, "quant_method", METHOD)
    _expect(config, "quantization_status", "compressed")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise Unsupported(f"{key} must be empty, got {config[key]}")
    targets: dict[str, Scheme] = {}
    for group in (config.get("config_groups") or {}).values():
        if not isinstance(group, Mapping):
            raise Unsupported(f"config_groups must hold schemes, got {group}")
        _expect({"format": group.get("format") or config.get("format")}, "format", FORMAT)
        scheme = _read_group(group)
        targets.update(dict.fromkeys(group.get("targets") or (), scheme))
    if not targets:
        raise Unsupported("config_groups must have targets, got none")
    return Layout(targets, tuple(config.get("ignore") or ()))


def _read_group(group: Mapping[str, Any]) -> Scheme:
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise Unsupported(f"{key} must be null, got {group[key]}")
    weights = group.get("weights") or {}
    for key, allowed in (("type", "int"), ("symmetric", True), ("dynamic", False)):
        if weights.get(key, allowed) != allowed:
            raise Unsupported(f"weights.{key} must be {allowed}, got {weights[key]}")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise Unsupported(f"weights.actorder must be null or weight, got {weights['actorder']}")
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if bits not in BITS:
        raise Unsupported(f"weights.num_bits must be 4 or 8, got {bits}")
    strategy = weights.get("strategy") or (
        "channel" if size == -1 else "group" if size else "tensor"
    )
    if strategy == "channel":
        return Scheme(bits, -1)
    if strategy != "group" or not isinstance(size, int) or size < 1:
        raise Unsupported(f"weights must be scaled by group or channel, got {strategy} {size}")
    return Scheme(bits, size)


def _expect(config: Mapping[str, Any], key: str, allowed: str) -> None:
    if config.get(key) != allowed:
        raise Unsupported(f"{key} must be {allowed}, got {config.get(key)}")
