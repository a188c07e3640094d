"""compressed-tensors checkpoints in transformers: config and quantizer that give `PackedLinear`.

Pack-quantized, symmetric, weight-only checkpoints of 4 or 8 bits are loaded here, without the
compressed-tensors package. Anything else that the method means (activations, zero points, other
formats, ``dequantize=True``) goes to transformers' own quantizer, as if grace was not there.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as transformers_config

from grace.checkpoint import TensorInfo
from grace.formats.compressed_tensors import TENSORS, Scheme, shapes
from grace.formats.compressed_tensors_config import Unsupported, read_config
from grace.integrations._loading import cast_dense, check_whole, common_dtype, read_headers
from grace.nn import PackedLinear, unfuse

logger = logging.getLogger(__name__)


class CompressedTensorsConfig(transformers_config.CompressedTensorsConfig):
    """The ``quantization_config`` of a checkpoint that grace runs, kept as it was written.

    It bears the name of transformers' class because transformers compares names when a user passes
    a config of his own (``quantization_config=CompressedTensorsConfig(dequantize=True)``).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Not the parent's: that one needs the compressed-tensors package.
        self.quant_method = transformers_config.QuantizationMethod.COMPRESSED_TENSORS
        self.quantization_config = None
        self.dequantize = False
        self.use_optimized_inference = False
        self.written = copy.deepcopy(dict(config))

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Our config where grace runs what it describes, else transformers' own."""
        try:
            read_config(config_dict)
        except Unsupported as reason:
            logger.info("grace leaves this checkpoint to transformers: %s", reason)
            stock = transformers_config.CompressedTensorsConfig
            return stock.from_dict(dict(config_dict), return_unused_kwargs, **kwargs)
        return (cls(config_dict), kwargs) if return_unused_kwargs else cls(config_dict)

    def to_dict(self) -> dict[str, Any]:
        """The config as it was written."""
        return copy.deepcopy(self.written)

    def to_diff_dict(self) -> dict[str, Any]:
        """The config as it was written."""
        return self.to_dict()

    def as_stock(self) -> transformers_config.CompressedTensorsConfig:
        """The same in transformers' own class, which needs the compressed-tensors package."""
        config = transformers_config.CompressedTensorsConfig.from_dict(self.to_dict())
        config.dequantize = self.dequantize
        return config


class PackedQuantizer(HfQuantizer):
    """Loads pack-quantized checkpoints into `PackedLinear`; dense weights never exist."""

    requires_calibration = True  # there is nothing to quantize here: weights come quantized
    quantization_config: CompressedTensorsConfig

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stock: HfQuantizer | None = None
        self._dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any dtype is fine; it is kept for what is not quantized."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        tensors = read_headers(checkpoint_files)
        try:
            schemes = plan(model, self.quantization_config.written, tensors)
        except Unsupported as reason:
            logger.info("grace leaves %s to transformers: %s", type(model).__name__, reason)
            config = self.quantization_config.as_stock()
            self._stock = CompressedTensorsHfQuantizer(config, pre_quantized=True)
            self._stock.validate_environment()
            self._stock._process_model_before_weight_loading(model, **kwargs)
            return
        _check_complete(tensors, schemes)
        scales = [name for name in tensors if name.endswith(".weight_scale")]
        for name, scheme in schemes.items():
            linear = model.get_submodule(name)
            layer = PackedLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                bits=scheme.bits,
                group_size=scheme.group_size,
                scale_dtype=common_dtype(tensors, scales),
                device="meta",
                dtype=linear.weight.dtype,
            )
            model.set_submodule(name, layer)
        check_whole(model, tensors)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._stock is not None:
            self._stock._process_model_after_weight_loading(model, **kwargs)
            return
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear) and not module.is_packed:
                module.pack_(name)
        cast_dense(model, self._dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What ``model.dequantize()`` does: every packed layer becomes the linear it stands for."""
        unfuse(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, PackedLinear):
                model.set_submodule(name, dense_linear(layer, dtype or model.dtype))
        return model

    def update_weight_conversions(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' conversions, or its own quantizer's where that one took over."""
        if self._stock is None:
            return super().update_weight_conversions(*args, **kwargs)
        return self._stock.update_weight_conversions(*args, **kwargs)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the format that was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed layers have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The ops trace."""
        return True


def plan(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Scheme]:
    """Name and scheme of every linear of ``model`` that is packed in the checkpoint.

    Raises:
        Unsupported: the config, or something of this model that it quantizes, is not run by grace.
    """
    layout = read_config(config)
    schemes: dict[str, Scheme] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        scheme = layout.scheme_of(name, [base.__name__ for base in type(module).__mro__])
        if scheme is None:
            continue
        if type(module) is not nn.Linear or f"{name}.weight" in _tied(model):
            raise Unsupported(f"{name} must be an untied nn.Linear, got {type(module).__name__}")
        try:
            shapes(module.out_features, module.in_features, scheme, name)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        schemes[name] = scheme
    if not schemes or not tensors:
        raise Unsupported("quantized linears in safetensors files must be there, got none")
    experts = [key for key in tensors if ".experts." in key and key.endswith(".weight_packed")]
    if experts and not any(".experts." in name for name in schemes):
        raise Unsupported(f"experts must be linears of their own, got {experts[0]} fused")
    return schemes


def dense_linear(layer: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """The `nn.Linear` of a packed layer's weight, in ``dtype``, on its device."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight, bias = layer.dequantize(dtype), layer.bias
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear.train(layer.training)


def _tied(model: nn.Module) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}


def _check_complete(tensors: Iterable[str], schemes: Mapping[str, Scheme]) -> None:
    """Says what is missing before anything is loaded: transformers would only warn, and invent it.

    Names in files may differ from those in the model, but not behind the layer's number.
    """
    names = set(tensors)
    stems = {n.rpartition(".")[0] for n in names if n.endswith(tuple("." + t for t in TENSORS))}
    for stem in sorted(stems):
        for tensor in TENSORS:
            if f"{stem}.{tensor}" not in names:
                raise ValueError(
                    f"from_pretrained: checkpoint must hold {stem}.{tensor}, got no such tensor"
                )
    if len(stems) < len(schemes):
        tails = {_tail(stem) for stem in stems}
        lost = next((name for name in schemes if _tail(name) not in tails), "some")
        raise ValueError(
            f"from_pretrained: checkpoint must hold {len(schemes)} packed linears, "
            f"got {len(stems)}, without {lost}"
        )


def _tail(name: str) -> str:
    return re.sub(r"^.*?(\w+\.\d+\.)", r"\1", name)
