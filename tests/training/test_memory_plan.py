"""The memory of a run: counts against real models, activations against what autograd keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from grace.nn import FakeQuantLinear
from grace.nn.quantize_ahead import quantize_ahead
from grace.quantization import quantize
from grace.training import GraceConfig
from grace.training.adapters import adapter_for
from grace.training.memory_plan import (
    Load,
    activations,
    estimate,
    held_weights,
    layer_activations,
    logits,
    optimizer_bytes,
)
from grace.training.model_sizes import empty_model, read_config, size_of
from grace.training.step import model_inputs

KINDS = list(families.FAMILIES)
LOAD = Load(rows=2, tokens=8)


def _config(tmp_path: Path, **options: Any) -> GraceConfig:
    return GraceConfig(output_dir=str(tmp_path), use_cpu=True, group_size=16, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_a_real_model(kind: str, tmp_path: Path) -> None:
    model = families.FAMILIES[kind]()
    overrides = {"down_proj$": {"bits": 8, "group_size": -1}, "k_proj$": None}
    config = _config(tmp_path, overrides=overrides)
    model.save_pretrained(tmp_path / "model")
    empty = empty_model(read_config(str(tmp_path / "model")))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    size = size_of(empty, settings=config.layer_settings())
    before = sum(p.numel() for p in model.parameters())
    quantize(model, **config.layer_settings())
    adapter = adapter_for(model)
    adapter.freeze_vision()
    layers = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
    assert size.parameters == before == sum(size.parts.values())
    assert size.quantized == sum(layer.weight.numel() for layer in layers)
    assert size.log_scales == sum(layer.log_scale.numel() for layer in layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.trainable + size.log_scales == trained
    assert size.parts["vision tower"] == before + size.log_scales - trained
    assert size.decoder.classes * size.decoder.width == adapter.head.numel()
    assert size.decoder.layer_weights * 4 == sum(
        m.weight.numel()
        for m in adapter.layers.modules()
        if isinstance(m, nn.Linear | type(layers[0]))
    )


def _kept(model: nn.Module, batch: dict[str, torch.Tensor], autocast: bool) -> int:
    """Bytes that a forward keeps for the backward, beside parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(**batch, logits_to_keep=1, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_keeps_what_the_formula_says(kind: str, autocast: bool) -> None:
    """The difference of a model of four layers and one of two."""
    kept = []
    for layers in (2, 4):
        model = families.FAMILIES[kind](num_hidden_layers=layers, intermediate_size=80)
        quantize(model, group_size=16)
        adapter_for(model).freeze_vision()
        quantize_ahead(adapter_for(model).layers)
        batch = model_inputs(families.batch(kind))
        kept.append(_kept(model, batch, autocast))
    compute = 2 if autocast else 4
    decoder = dataclasses.replace(size_of(model).decoder, layer_weights=0)
    weights = sum(
        m.weight.numel()
        for m in adapter_for(model).layers[0].modules()
        if isinstance(m, FakeQuantLinear)
    )
    tokens = batch["input_ids"].numel()
    expected = tokens * layer_activations(decoder, compute) + compute * weights
    assert (kept[1] - kept[0]) / 2 == pytest.approx(expected, rel=0.03)


@pytest.fixture
def size() -> Any:
    model = empty_model(families.qwen3_vl().config)
    options = {"bits": 4, "group_size": 16, "skip": None, "overrides": None}
    return size_of(model, settings=options)


def test_activations_grow_with_tokens_and_shrink_by_checkpointing(size: Any) -> None:
    twice = dataclasses.replace(LOAD, tokens=16)
    for on in (False, True):
        few, many = (activations(size, load, on) for load in (LOAD, twice))
        weights = 2 * size.decoder.layer_weights * (1 if on else size.decoder.layers)
        assert many - weights == 2 * (few - weights)
    assert activations(size, LOAD, True) < activations(size, LOAD, False) / 2
    inputs = activations(size, LOAD, True) - activations(size, LOAD, False) // 4
    assert inputs == 4 * 16 * 4 * 32  # layers, tokens, bytes, width


def test_parts_of_the_estimate(size: Any, tmp_path: Path) -> None:
    parts = estimate(size, size, _config(tmp_path), LOAD)
    assert parts["student, fp32 masters"] == 4 * (size.parameters + size.log_scales)
    assert parts["gradients"] == 4 * (size.trainable + size.log_scales)
    assert parts["optimizer"] == 2 * parts["gradients"]
    assert parts["teacher"] == 2 * size.parameters
    alone = estimate(size, None, _config(tmp_path, distillation="none", omega=0.0), LOAD)
    assert alone["teacher"] == alone["teacher's forward"] == 0


def test_ranks_share_or_repeat(size: Any, tmp_path: Path) -> None:
    one, config = LOAD, _config(tmp_path)
    ddp, fsdp = (dataclasses.replace(LOAD, gpus=4, sharded=sharded) for sharded in (False, True))
    whole, repeated, shared = (estimate(size, size, config, load) for load in (one, ddp, fsdp))
    for part in ("student, fp32 masters", "gradients", "optimizer"):
        assert repeated[part] == whole[part]
        assert shared[part] == whole[part] // 4
    assert shared["teacher"] == whole["teacher"]
    assert repeated["buckets of DDP"] == whole["gradients"]
    assert shared["workspace"] > whole["workspace"]


def test_optimizers(size: Any, tmp_path: Path) -> None:
    assert optimizer_bytes("OptimizerNames.ADAMW_TORCH") == 8
    assert optimizer_bytes("adamw_torch_fused") == 8
    assert optimizer_bytes("sgd") == 0
    assert estimate(size, None, _config(tmp_path, optim="sgd"), LOAD)["optimizer"] == 0


def test_logits_are_bounded_whatever_the_length(size: Any, tmp_path: Path) -> None:
    config = _config(tmp_path)
    long = dataclasses.replace(LOAD, tokens=2**24)
    longer = dataclasses.replace(LOAD, tokens=2**26)
    assert logits(size, size, config, LOAD) < logits(size, size, config, long)
    assert logits(size, size, config, long) == logits(size, size, config, longer) < 2**30


def test_held_weights_count_where_checkpointing_would_not_keep_them(
    size: Any, tmp_path: Path
) -> None:
    options = {"hold_quantized": True, "gradient_checkpointing": True}
    assert held_weights(size, LOAD, _config(tmp_path, **options)) == 2 * size.quantized
    assert held_weights(size, LOAD, _config(tmp_path, hold_quantized=True)) == 0
    options["hold_quantized"] = None  # the default: this size is small
    assert held_weights(size, LOAD, _config(tmp_path, **options)) == 2 * size.quantized


def test_models_that_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a directory with config\.json, got ./no"):
        read_config("./no")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"must be of a known family .*, got 'bert'"):
        read_config(str(tmp_path))
