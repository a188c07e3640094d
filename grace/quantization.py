"""Which linears are quantized, and the two steps: `quantize` to train, `pack` to run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from grace.formats.compressed_tensors import BITS, Scheme
from grace.formats.layouts import COMPRESSED, Layout
from grace.log_scale import init_log_scale
from grace.nn import FakeQuantLinear, PackedLinear
from grace.nn import fuse as nn_fuse
from grace.nn.fake_quant_linear import Product
from grace.nn.head import check_head, quantize_head
from grace.ops.fake_quant import groups_of

__all__ = ["decoder_linears", "init_log_scale", "pack", "quantize"]

QAT_METHOD = "grace"  # quant_method of a checkpoint that is still in training


def quantize(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    skip: Sequence[str] | str | None = None,
    *,
    scale_dtype: torch.dtype | None = torch.bfloat16,
    init: str = "mse",
    product: Product = "dense",
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> list[str]:
    """Replaces the linears of the language model's decoder layers by `FakeQuantLinear`, in place.

    Vision tower, projector, embeddings and lm_head stay as they are; weights and biases are shared
    with the linears replaced, not copied. The model's config, where it has one, records what was
    done, so that a saved model loads as it was.

    Args:
        model: a causal or vision-language model of transformers, or any module with an embedding
            and a ModuleList of decoder layers.
        bits: 2 to 8.
        group_size: columns that share a scale; -1: a whole row.
        skip: regexes; a linear whose name one of them finds (`re.search`) stays as it is.
        scale_dtype: grid of the scales; None keeps them float32.
        init: method of `init_log_scale`.
        product: how the layers multiply while they train, "dense" or "packed" (`FakeQuantLinear`);
            not recorded: it changes no weight.
        overrides: regex → settings of the linears whose names it finds, any of bits, group_size,
            scale_dtype, init, product; or None: they stay as they are. Later ones win over earlier.

    Returns:
        Names of the linears replaced.

    Raises:
        ValueError: bits, group size or method not allowed, a layer that group_size does not divide,
            a regex that matches nothing, no linear to quantize. The model is then unchanged.
    """
    common = {
        "bits": bits,
        "group_size": group_size,
        "scale_dtype": scale_dtype,
        "init": init,
        "product": product,
    }
    settings = layer_settings(model, common, skip, overrides)
    linears = {name: model.get_submodule(name) for name in settings}
    layers = {
        name: FakeQuantLinear.from_linear(cast(nn.Linear, linear), **settings[name])
        for name, linear in linears.items()
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    record(model)
    return list(layers)


def record(model: nn.Module) -> None:
    """Writes into the model's config, where it has one, which of its linears are fake-quantized."""
    _record(model, qat_config(model))


def layer_settings(
    model: nn.Module,
    common: Mapping[str, Any],
    skip: Sequence[str] | str | None = None,
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Which linears `quantize` replaces, by name, and with which settings; it changes nothing.

    Args:
        model: as for `quantize`; it may be on the meta device.
        common: settings of a layer that no override finds; bits and group_size at least.
        skip: as there.
        overrides: as there.

    Raises:
        ValueError: as there.
    """
    linears = _select(decoder_linears(model), [skip] if isinstance(skip, str) else skip or ())
    settings: dict[str, dict[str, Any] | None] = {name: dict(common) for name in linears}
    for pattern, override in (overrides or {}).items():
        _check_override(model, linears, pattern, override)
        for name in linears:
            if re.search(pattern, name):
                settings[name] = None if override is None else {**common, **override}
    kept = {name: chosen for name, chosen in settings.items() if chosen is not None}
    if not kept:
        raise ValueError(f"quantize: overrides must leave linears to quantize, got {overrides}")
    for name, chosen in kept.items():
        columns = linears[name].in_features
        groups_of(f"quantize: {name}", columns, chosen["bits"], chosen["group_size"])
    return kept


def _check_override(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    pattern: str,
    override: Mapping[str, Any] | None,
) -> None:
    allowed = ("bits", "group_size", "scale_dtype", "init", "product")
    for key in override or {}:
        if key not in allowed:
            raise ValueError(f"quantize: an override must have {', '.join(allowed)}, got {key!r}")
    # What is never quantized (lm_head) may be said not to be, but not be given bits.
    known = linears if override is not None else dict(model.named_modules())
    if not any(re.search(pattern, name) for name in known):
        kind = "decoder linears" if override is not None else "modules"
        raise ValueError(f"quantize: overrides must match {kind} of the model, got {pattern!r}")


def pack(model: nn.Module, *, fuse: bool = False, lm_head_bits: int | None = None) -> list[str]:
    """Replaces every `FakeQuantLinear` by a `PackedLinear` of the same codes and scales, in place.

    Args:
        model: a model that `quantize` prepared.
        fuse: then let layers of one input run as one call (`grace.nn.fuse`). Not unless asked for:
            it replaces MLP modules, and hooks on projections added later may not run.
        lm_head_bits: 8 packs the output head, too, to nearest (`grace.nn.quantize_head`): it
            **changes logits**, and the model must not be saved then.

    Returns:
        Names of the layers replaced, the head not among them.

    Raises:
        ValueError: a layer of neither 4 nor 8 bits, linears that servers fuse with unlike schemes,
            nothing to pack, or a head that cannot be packed. The model is then unchanged.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    if not layers:
        raise ValueError("pack: model must hold FakeQuantLinear layers, got none")
    check_packable("pack", model)
    if lm_head_bits is not None:
        check_head("pack", model, lm_head_bits)
    config = packed_config(model)
    for name, layer in layers.items():
        packed = PackedLinear.from_codes(
            *layer.quantize(), layer.bias, bits=layer.bits, group_size=layer.group_size
        )
        model.set_submodule(name, packed)
    _record(model, config)
    if lm_head_bits is not None:
        quantize_head(model, lm_head_bits)
    if fuse:
        nn_fuse(model)
    return list(layers)


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The `nn.Linear` modules inside the decoder layers of the model's language model, by name.

    Raises:
        ValueError: there are no decoder layers.
    """
    prefix, layers = decoder_layers(model)
    return {f"{prefix}.{name}": linear for name, linear in _linears(layers).items()}


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers of the model's language model, and their name.

    The language model is the module that holds the token embedding; its decoder layers are the
    ModuleList with the most linears in it.

    Raises:
        ValueError: there is no such ModuleList.
    """
    prefix, owner = _embedding_owner(model)
    layers = max(_module_lists(owner), key=lambda item: _layer_count(item[1]), default=None)
    if layers is None or not _layer_count(layers[1]):
        raise ValueError(
            "quantize: model must have a ModuleList of decoder layers with linears beside its "
            f"token embedding, got {type(model).__name__}"
        )
    return ".".join(part for part in (prefix, layers[0]) if part), layers[1]


def _embedding_owner(model: Any) -> tuple[str, nn.Module]:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name, module in model.named_modules():
        children = list(module.children())
        if embedding is None and any(isinstance(child, nn.Embedding) for child in children):
            return name, module
        if embedding is not None and any(child is embedding for child in children):
            return name, module
    raise ValueError(f"quantize: model must have a token embedding, got {type(model).__name__}")


def _module_lists(owner: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """ModuleLists beside the embedding, or, where there is none, anywhere below its owner."""
    direct = [(n, m) for n, m in owner.named_children() if isinstance(m, nn.ModuleList)]
    below = ((n, m) for n, m in owner.named_modules() if isinstance(m, nn.ModuleList))
    yield from direct if any(_layer_count(layers) for _, layers in direct) else below


def _layer_count(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Linear | FakeQuantLinear | PackedLinear) for m in module.modules())


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    # Subclasses of nn.Linear mean something else (or are quantized already): only linears proper.
    return {n: m for n, m in module.named_modules() if type(m) is nn.Linear}


def _select(linears: Mapping[str, nn.Linear], skip: Sequence[str]) -> dict[str, nn.Linear]:
    if not linears:
        raise ValueError("quantize: decoder layers must hold linears, got them all quantized")
    for pattern in skip:
        if not any(re.search(pattern, name) for name in linears):
            raise ValueError(f"quantize: skip must match linears of the model, got {pattern!r}")
    kept = {n: m for n, m in linears.items() if not any(re.search(p, n) for p in skip)}
    if not kept:
        raise ValueError(f"quantize: skip must leave linears to quantize, got {list(skip)}")
    return kept


def check_packable(op: str, model: nn.Module) -> None:
    """Requires that every low-bit layer has a width that packed layers have: 4 or 8."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear) and module.bits not in BITS:
            raise ValueError(f"{op}: bits of {name} must be 4 or 8, got {module.bits}")


def qat_config(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` of a model in training: what `from_pretrained` rebuilds."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            dtype = None if module.scale_dtype is None else str(module.scale_dtype).split(".")[-1]
            groups.setdefault((module.bits, module.group_size, dtype), []).append(name)
    return {
        "quant_method": QAT_METHOD,
        "groups": [
            {"bits": bits, "group_size": size, "scale_dtype": dtype, "modules": names}
            for (bits, size, dtype), names in groups.items()
        ],
    }


def packed_config(model: nn.Module, layout: Layout = COMPRESSED) -> dict[str, Any]:
    """The ``quantization_config`` of a model with low-bit layers of any kind, for a format.

    Raises:
        ValueError: as the format's ``make_config``.
    """
    quantized = {
        name: Scheme(module.bits, module.group_size)
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantLinear | PackedLinear)
    }
    return layout.make_config(
        quantized, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    )


def _record(model: Any, quantization_config: dict[str, Any]) -> None:
    if hasattr(model, "config"):
        model.config.quantization_config = quantization_config
