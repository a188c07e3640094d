"""How many parameters a model has, by what training does with them: from its config alone.

The model is built on the meta device, so that no weight is made or read: seconds for any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.ops.fake_quant import groups_of
from grace.quantization import layer_settings
from grace.training.adapters import Adapter, adapter_for, family


@dataclass(frozen=True)
class Decoder:
    """Geometry of a decoder: what its activations and logits go by."""

    layers: int
    width: int
    inner: int
    query_width: int  # heads * head_dim
    key_width: int  # key-value heads * head_dim
    heads: int
    key_heads: int
    normed_heads: bool  # queries and keys have norms of their own
    classes: int
    layer_weights: int  # of the linears of one layer


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, and the geometry of its decoder.

    Attributes:
        parameters: all of them; tied ones count once.
        parts: the same by part: language model, projector, vision tower.
        trainable: those with a gradient.
        quantized: weights behind fake quantization.
        log_scales: their log-scales, which are in no other count.
    """

    kind: str
    parameters: int
    parts: dict[str, int]
    trainable: int
    quantized: int
    log_scales: int
    decoder: Decoder


def read_config(name: str) -> Any:
    """The config of a local directory or hub name.

    Raises:
        FileNotFoundError: a path without config.json.
        ValueError: a family that is not known.
    """
    from transformers import AutoConfig

    path = Path(name)
    if (path.exists() or name.startswith((".", "/"))) and not (path / "config.json").is_file():
        raise FileNotFoundError(f"plan: model must be a directory with config.json, got {name}")
    config = AutoConfig.from_pretrained(name)
    family(config.model_type)
    return config


def empty_model(config: Any) -> nn.Module:
    """A model of `config` on the meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def size_of(model: nn.Module, *, freeze_vision: bool = True, settings: Any = None) -> ModelSize:
    """Counts of `model`, which may be on the meta device; it is not changed.

    Args:
        model: of a family that trains.
        freeze_vision: whether its vision tower is left out of `trainable`.
        settings: arguments of `grace.quantize`; None: nothing is quantized.

    Raises:
        ValueError: as `adapter_for` and `grace.quantize`.
    """
    adapter = adapter_for(model)
    parts = _parts(model, adapter)
    parameters = _count(model.parameters())
    quantized, log_scales = (0, 0) if settings is None else _quantized(model, settings)
    return ModelSize(
        kind=adapter.config.model_type,
        parameters=parameters,
        parts=parts,
        trainable=parameters - (parts["vision tower"] if freeze_vision else 0),
        quantized=quantized,
        log_scales=log_scales,
        decoder=_decoder(adapter),
    )


def _count(parameters: Any) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def _parts(model: nn.Module, adapter: Adapter) -> dict[str, int]:
    projector = {id(p): p for m in adapter.projector_modules() for p in m.parameters()}
    tower = {id(p): p for m in adapter.vision_modules() for p in m.parameters()}
    counts = {
        "projector": _count(projector.values()),
        "vision tower": _count(p for key, p in tower.items() if key not in projector),
    }
    return {"language model": _count(model.parameters()) - sum(counts.values()), **counts}


def _quantized(model: nn.Module, settings: dict[str, Any]) -> tuple[int, int]:
    """Weights that `grace.quantize` would quantize, and log-scales it would make."""
    rest = {key: settings[key] for key in ("skip", "overrides")}
    common = {key: value for key, value in settings.items() if key not in rest}
    weights = scales = 0
    for name, chosen in layer_settings(model, common, **rest).items():
        linear: Any = model.get_submodule(name)
        groups = groups_of(name, linear.in_features, chosen["bits"], chosen["group_size"])
        weights += linear.weight.numel()
        scales += linear.out_features * groups
    return weights, scales


def _decoder(adapter: Adapter) -> Decoder:
    text = adapter.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer = adapter.layers[0]
    linears = (m for m in layer.modules() if isinstance(m, nn.Linear))
    return Decoder(
        layers=len(adapter.layers),
        width=text.hidden_size,
        inner=text.intermediate_size,
        query_width=text.num_attention_heads * head_dim,
        key_width=text.num_key_value_heads * head_dim,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        normed_heads=any(name.endswith("q_norm") for name, _ in layer.named_modules()),
        classes=adapter.head.shape[0],
        layer_weights=sum(linear.weight.numel() for linear in linears),
    )
