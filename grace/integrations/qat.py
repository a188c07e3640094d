"""Models saved in training, in transformers: config and quantizer that give `FakeQuantLinear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from grace.integrations._loading import cast_dense, check_whole, common_dtype, read_headers
from grace.nn import FakeQuantLinear
from grace.ops.fake_quant import groups_of
from grace.quantization import QAT_METHOD

_GROUP_KEYS = {"bits", "group_size", "scale_dtype", "modules"}


class QatConfig(QuantizationConfigMixin):
    """The ``quantization_config`` that `grace.quantize` leaves in a model's config.

    Raises:
        ValueError: groups without bits, group_size, scale_dtype and modules.
    """

    def __init__(self, groups: list[dict[str, Any]], quant_method: str = QAT_METHOD) -> None:
        for group in groups:
            if set(group) != _GROUP_KEYS:
                raise ValueError(
                    f"quantization_config: groups must have {', '.join(sorted(_GROUP_KEYS))}, "
                    f"got {', '.join(sorted(group))}"
                )
        self.quant_method: Any = quant_method  # transformers' enum cannot be extended
        self.groups = groups

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """Every quantized module's name, with its group."""
        return {name: group for group in self.groups for name in group["modules"]}


class QatQuantizer(HfQuantizer):
    """Loads a model saved in training into `FakeQuantLinear`, ready to go on.

    Master weights keep the dtype they were saved in, whatever ``dtype`` is asked for: their codes
    would be others.
    """

    requires_calibration = True  # there is nothing to quantize here: log-scales come trained
    quantization_config: QatConfig
    _dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any dtype is fine; it is kept for what is not quantized."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        tensors = read_headers(checkpoint_files)
        modules = self.quantization_config.modules
        stems = [n.removesuffix("log_scale") for n in tensors if n.endswith(".log_scale")]
        if tensors and len(stems) != len(modules):
            raise ValueError(
                f"from_pretrained: checkpoint must hold {len(modules)} log_scale tensors, "
                f"got {len(stems)}"
            )
        masters = [f"{stem}weight" for stem in stems if f"{stem}weight" in tensors]
        if len(masters) != len(stems):
            raise ValueError("from_pretrained: checkpoint must hold a weight for every log_scale")
        dtype = common_dtype(tensors, masters) if masters else None
        for name, group in modules.items():
            model.set_submodule(name, _empty(model, name, group, dtype))
        if tensors:
            check_whole(model, tensors)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name in self.quantization_config.modules:
            _check_shapes(name, model.get_submodule(name))
        cast_dense(model, self._dtype)

    def is_serializable(self) -> bool:
        """A model in training is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """That is what it is for."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All of it, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The ops trace."""
        return True


def _empty(
    model: nn.Module, name: str, group: dict[str, Any], dtype: torch.dtype | None
) -> FakeQuantLinear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"quantization_config: modules must be linears of {type(model).__name__}, got {name}"
        )
    return FakeQuantLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        bits=group["bits"],
        group_size=group["group_size"],
        scale_dtype=getattr(torch, group["scale_dtype"]) if group["scale_dtype"] else None,
        device="meta",
        dtype=dtype or linear.weight.dtype,
    )


def _check_shapes(name: str, layer: nn.Module) -> None:
    """transformers does not compare shapes where there is a quantizer."""
    assert isinstance(layer, FakeQuantLinear)
    rows, columns = layer.out_features, layer.in_features
    groups = groups_of(name, columns, layer.bits, layer.group_size)
    for key, expected in (("weight", (rows, columns)), ("log_scale", (rows, groups))):
        shape = tuple(getattr(layer, key).shape)
        if shape != expected:
            raise ValueError(
                f"from_pretrained: {name}.{key} must be {list(expected)} for group size "
                f"{layer.group_size}, got {list(shape)}"
            )
