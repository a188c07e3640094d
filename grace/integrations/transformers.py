"""transformers on grace's layers: after `register`, `from_pretrained` gives low-bit models.

- ``compressed-tensors`` checkpoints become models of `PackedLinear`
  (`grace.integrations.compressed_tensors`);
- models that were saved in training become models of `FakeQuantLinear` (`grace.integrations.qat`);
- `accelerate` is for a model that transformers loaded before grace was imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from grace.formats.compressed_tensors import TENSORS, Scheme, decode
from grace.formats.compressed_tensors_config import FORMAT, METHOD, Unsupported, read_config
from grace.integrations.compressed_tensors import CompressedTensorsConfig, PackedQuantizer
from grace.integrations.qat import QatConfig, QatQuantizer
from grace.nn import PackedLinear
from grace.nn import fuse as nn_fuse
from grace.nn.head import check_head, quantize_head
from grace.quantization import QAT_METHOD

__all__ = ["accelerate", "register"]


def register() -> None:
    """Makes transformers use grace's quantizers."""
    # Assigned: transformers' own registration refuses a method that it has.
    quantizers: dict[str, Any] = AUTO_QUANTIZER_MAPPING
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = CompressedTensorsConfig
    quantizers[METHOD] = _compressed_tensors_quantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QAT_METHOD] = QatConfig
    quantizers[QAT_METHOD] = QatQuantizer


def _compressed_tensors_quantizer(config: Any, **kwargs: Any) -> HfQuantizer:
    if not isinstance(config, CompressedTensorsConfig):
        return CompressedTensorsHfQuantizer(config, **kwargs)
    if config.dequantize:
        return CompressedTensorsHfQuantizer(config.as_stock(), **kwargs)
    return PackedQuantizer(config, **kwargs)


def accelerate(model: Any, *, fuse: bool = False, lm_head_bits: int | None = None) -> list[str]:
    """Puts a compressed-tensors model that transformers itself loaded on grace's kernels, in place.

    For models loaded before ``import grace``. Call it before the first forward, at which
    compressed-tensors would decompress the weights. Layers that grace cannot run stay as they are.

    Args:
        model: a model that transformers loaded.
        fuse: then let layers of one input run as one call (`grace.nn.fuse`). Not unless asked for:
            it replaces MLP modules, and hooks on projections added later may not run.
        lm_head_bits: 8 packs the output head, too, to nearest (`grace.nn.quantize_head`): it
            **changes logits**, and the model must not be saved then.

    Returns:
        Names of the layers replaced by `PackedLinear`, the head not among them.

    Raises:
        ValueError: weights that are decompressed already, or not in memory; a head that cannot be
            packed.
    """
    if lm_head_bits is not None:
        check_head("accelerate", model, lm_head_bits)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    packed = {n: m for n, m in layers.items() if hasattr(m, "weight_packed")}
    if layers and not packed:
        raise ValueError("accelerate: model must not have run yet, got decompressed weights")
    schemes = {name: _scheme_of(linear) for name, linear in packed.items()}
    replaced = [name for name, scheme in schemes.items() if scheme is not None]
    for name, scheme in schemes.items():
        if scheme is not None:
            model.set_submodule(name, _packed(name, packed[name], scheme))
    if len(replaced) == len(layers) and hasattr(model, "ct_decompress_hook"):
        model.ct_decompress_hook.remove()
        del model.ct_decompress_hook
    if lm_head_bits is not None:
        quantize_head(model, lm_head_bits)
    if fuse:
        nn_fuse(model)
    return replaced


def _scheme_of(linear: Any) -> Scheme | None:
    """Scheme of a layer that compressed-tensors prepared; None where grace cannot run it."""
    group = linear.quantization_scheme.model_dump()
    config = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group": {**group, "targets": ["Linear"]}},
    }
    try:
        return read_config(config).targets["Linear"] if type(linear) is nn.Linear else None
    except Unsupported:
        return None


def _packed(name: str, linear: Any, scheme: Scheme) -> PackedLinear:
    tensors: dict[str, Tensor] = {key: getattr(linear, key).detach() for key in TENSORS}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(f"accelerate: weights must be in memory, got {name} offloaded")
    codes, scales = decode(tensors, scheme, name)
    layer = PackedLinear.from_codes(
        codes, scales, linear.bias, bits=scheme.bits, group_size=scheme.group_size
    )
    return layer.train(linear.training)
