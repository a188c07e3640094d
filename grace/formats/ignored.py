"""What is not quantized, as the configs of AWQ and GPTQ name it: by substrings, by patterns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import any_inside, check_fused, name_patterns

# Servers ask for the matrices that they fuse by these names.
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}


def one_scheme(layout: str, quantized: Mapping[str, Scheme], other: Iterable[str]) -> Scheme:
    """The scheme of all ``quantized`` linears, of which the config of ``layout`` holds one.

    Raises:
        ValueError: no linear, or unlike ones.
    """
    schemes = list(dict.fromkeys(quantized.values()))
    if len(schemes) != 1:
        got = ", ".join(map(str, schemes)) or "none"
        raise ValueError(
            f"{layout}: quantized linears must be there and share bits and group size, got {got}"
        )
    check_fused(layout, quantized, other)
    return schemes[0]


def patterns(names: Iterable[str], spared: Iterable[str]) -> list[str]:
    """Few regexes (`re.match`) that match all of ``names`` and none of ``spared``."""
    return [entry.removeprefix("re:") for entry in name_patterns(_with_fused(names), spared)]


def substrings(names: Iterable[str], spared: Iterable[str]) -> list[str]:
    """Few parts of names, one of which is in each of ``names`` and none in any of ``spared``.

    Of a container first a short part, as servers rename modules and look for it anywhere, then its
    whole name, as transformers looks for beginnings and ends.
    """
    spared = list(spared)
    found: dict[str, None] = {}
    for name in _with_fused(names):
        if not any(part in name for part in found):
            found.update(dict.fromkeys(_substrings(name, spared)))
    return list(found)


def _substrings(name: str, spared: Sequence[str]) -> Iterator[str]:
    parts = name.split(".")
    depth = next(
        (d for d in range(1, len(parts)) if not any_inside(".".join(parts[:d]), spared)),
        len(parts),
    )
    whole = ".".join(parts[:depth])
    if any(whole in other for other in spared):  # layers.1 is also in layers.10
        whole, depth = name, len(parts)
    for begin in range(depth - 1, 0, -1):
        part = ".".join(parts[begin:depth])
        # A number alone does not say of what.
        if not parts[begin].isdigit() and not any(part in other for other in spared):
            yield part
            break
    yield whole


def _with_fused(names: Iterable[str]) -> list[str]:
    all_names = list(names)
    for name in list(all_names):
        parent, _, last = name.rpartition(".")
        if last in _FUSED:
            all_names.append(f"{parent}.{_FUSED[last]}")
    return all_names
