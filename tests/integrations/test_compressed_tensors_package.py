"""Conformance with the compressed-tensors package: it reads what we write, we read what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from packed_models import packed_layers, tensors_of
from torch import Tensor, nn

import grace

package = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402

IGNORED = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*visual.*"]
SCHEMES = [(bits, size) for bits in (4, 8) for size in (32, 64, -1)]


def prepare(model: nn.Module, bits: int, group_size: int) -> dict[str, Any]:
    """Gives the decoder's linears the package's scheme, and weights of its own observers' kind."""
    strategy = "channel" if group_size == -1 else "group"
    size = None if group_size == -1 else group_size
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=IGNORED, format="pack-quantized"
    )
    apply_quantization_config(model, config)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight_scale")}
    for layer in layers.values():
        groups = layer.weight.float().view(*layer.weight_scale.shape, -1)
        layer.weight_scale.data.copy_(groups.abs().amax(-1) / (2 ** (bits - 1) - 1))
        layer.quantization_status = QuantizationStatus.FROZEN
    return layers


def write_by_package(model: Any, directory: Path, bits: int, group_size: int) -> dict[str, Tensor]:
    """Saves by the package alone; gives the weights that it says it stored."""
    layers = prepare(model, bits, group_size)
    stored = {
        name: fake_quantize(
            layer.weight,
            layer.weight_scale,
            getattr(layer, "weight_zero_point", None),
            layer.quantization_scheme.weights,
        )
        for name, layer in layers.items()
    }
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    return stored


def read_by_package(model: Any, directory: Path, bits: int, group_size: int) -> dict[str, Tensor]:
    """Decompresses the tensors of a checkpoint with the package, without transformers' loader."""
    layers = prepare(model, bits, group_size)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    files = tensors_of(directory)
    for name, layer in layers.items():
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            value, place = files[f"{name}.{part}"], getattr(layer, part)
            assert (value.dtype, value.shape) == (place.dtype, place.shape), f"{name}.{part}"
            place.data.copy_(value)
    compressor.decompress_model(model)
    return {name: layer.weight for name, layer in layers.items()}


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_it_decompresses_what_we_write(bits: int, group_size: int, tmp_path: Path):
    model = models.qwen2().bfloat16()
    names = grace.quantize(model, bits=bits, group_size=group_size)
    grace.export(model, tmp_path / "out")
    read = read_by_package(models.qwen2().bfloat16(), tmp_path / "out", bits, group_size)
    assert list(read) == names
    for name, weight in read.items():
        assert torch.equal(weight, model.get_submodule(name).quantized_weight()), name


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
@pytest.mark.parametrize("name", ["qwen2", "llava", "qwen2_vl"])
def test_we_read_what_it_writes(name: str, bits: int, group_size: int, tmp_path: Path):
    model = models.ALL[name]().bfloat16()
    stored = write_by_package(model, tmp_path / "out", bits, group_size)
    kind = type(model)
    loaded = kind.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    layers = packed_layers(loaded)
    assert layers.keys() == stored.keys()
    for layer, weight in stored.items():
        assert (layers[layer].bits, layers[layer].group_size) == (bits, group_size)
        assert torch.equal(layers[layer].dequantize(torch.bfloat16), weight), layer


@pytest.mark.parametrize("group_size", [32, -1])
def test_import_takes_what_it_writes(group_size: int, tmp_path: Path):
    stored = write_by_package(models.llava().bfloat16(), tmp_path / "theirs", 4, group_size)
    assert grace.import_published(tmp_path / "theirs", tmp_path / "ours").ok
    load = transformers.AutoModelForImageTextToText.from_pretrained
    for name, layer in packed_layers(load(tmp_path / "ours")).items():
        assert torch.equal(layer.dequantize(torch.bfloat16), stored[name])
