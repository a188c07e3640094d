"""Round-to-nearest, GPTQ and AWQ on whole models, of every family and with images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import models
import numpy as np
import pytest
import torch
import transformers
from ptq_models import inputs, made
from torch import Tensor, nn

import grace
from grace import quantization
from grace.nn import FakeQuantLinear, PackedLinear
from grace.ptq import awq
from grace.ptq.calibration import Calibration
from grace.ptq.gptq import Hessian, output_error
from grace.ptq.grid import Grid
from grace.ptq.structure import groups, with_source

REFERENCE = Path(__file__).parents[1] / "data" / "llmcompressor.npz"


def linear_errors(model: nn.Module, low: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Error of every low-bit linear's outputs on the inputs that it has in ``low``, against the
    weight of ``model``, which was not quantized."""
    hessians: dict[str, Hessian] = {}
    hooks = []
    for name, layer in low.named_modules():
        if isinstance(layer, FakeQuantLinear):
            hessians[name] = Hessian(layer.in_features, "cpu")
            see = lambda _, args, h=hessians[name]: h.add(args[0].flatten(0, -2))  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(see))
    with torch.no_grad():
        low(**batch)
        for hook in hooks:
            hook.remove()
        return {
            name: float(
                output_error(
                    low.get_submodule(name).quantized_weight() - model.get_submodule(name).weight,
                    hessian.matrix(name),
                ).sum()
            )
            for name, hessian in hessians.items()
        }


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_gptq_is_nearer_than_rounding_in_every_layer(kind: str) -> None:
    model, batch = made(kind), inputs(kind)
    low = copy.deepcopy(model)
    names = grace.ptq.quantize(low, "gptq", [batch], group_size=16, progress=False)
    assert names == list(quantization.decoder_linears(model))
    errors = linear_errors(model, low, batch)
    plain = copy.deepcopy(low)  # the same inputs: only the weights are rounded to nearest
    for name in names:
        weight = model.get_submodule(name).weight
        grid = Grid(4, 16, torch.bfloat16)
        nearest = grid.nearest(weight.detach(), grid.find(weight.detach()))
        plain.get_submodule(name).weight.data = nearest
        plain.get_submodule(name).log_scale.data = grid.find(weight.detach())
        layer = low.get_submodule(name)
        assert torch.equal(layer.quantized_weight(), layer.weight)
    rounded = linear_errors(model, low_with(low, plain), batch)
    assert all(errors[name] < rounded[name] for name in names)


def low_with(low: nn.Module, plain: nn.Module) -> nn.Module:
    """``low``, whose linears run as they are and are judged by the weights of ``plain``."""
    judged = copy.deepcopy(low)
    for name, layer in judged.named_modules():
        if isinstance(layer, FakeQuantLinear):
            other = plain.get_submodule(name)
            layer.ahead, layer.held = layer.quantized_weight().detach(), True
            layer.weight, layer.log_scale = other.weight, other.log_scale
    return judged


def test_awq_is_nowhere_worse_than_rounding() -> None:
    """Per group: the search's own objective, and after clipping that of every linear."""
    kind = "llava"
    model, batch = made(kind, num_key_value_heads=4), inputs(kind)
    _, layers = quantization.decoder_layers(model)
    layer, grid, device = layers[0], Grid(3, 16, torch.bfloat16), torch.device("cpu")
    better = 0
    with torch.no_grad():
        calibration = Calibration(model, layers, [batch])
        run = lambda: calibration.run(calibration.samples[0], 0)  # noqa: E731
        found = [with_source(layer, group, run) for group in groups(layer, run)]
        for group, observed in awq.observe(calibration, 0, found).items():
            hessian = observed.hessian.matrix("layer")
            plain = {n: layer.get_submodule(n).weight.detach().clone() for n in group.names}
            searched = awq.search_scale(layer, group, observed, grid, group.names, device)
            assert all(torch.equal(layer.get_submodule(n).weight, w) for n, w in plain.items())
            assert searched.error <= searched.plain_error
            better += searched.error < 0.98 * searched.plain_error
            for weight in plain.values():
                scaled = weight * searched.scale
                inverse = hessian / searched.scale.outer(searched.scale)
                log_scale = awq.clip(scaled, inverse, grid)
                ours = (grid.nearest(scaled, log_scale) - scaled) / searched.scale
                theirs = grid.nearest(scaled, grid.find(scaled)) - scaled
                clipped = output_error(ours, hessian)
                assert (clipped <= output_error(theirs / searched.scale, hessian) * 1.0001).all()
    assert better >= 2


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("rtn", torch.bfloat16),
        ("gptq", torch.float32),
        ("gptq", torch.bfloat16),
        ("awq", torch.bfloat16),
    ],
)
def test_the_model_packs_and_exports_bit_for_bit(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = models.qwen2().to(dtype)
    batches = [{"input_ids": torch.randint(3, 80, (2, 24))} for _ in range(2)]
    options: dict[str, Any] = {"bits": 4 if dtype == torch.float32 else 8, "group_size": 32}
    names = grace.ptq.quantize(model, method, batches, progress=False, **options)
    weights = {name: model.get_submodule(name).quantized_weight() for name in names}
    for name in names:
        layer = model.get_submodule(name)
        assert torch.equal(layer.log_scale.exp().to(torch.bfloat16), layer.quantize()[1])
        if method != "rtn":
            assert torch.equal(layer.weight, weights[name])
    certificate = grace.export(model, tmp_path / "out")
    assert certificate.ok
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert grace.pack(model) == names
    for name, weight in weights.items():
        for other in (model, loaded):
            packed = other.get_submodule(name)
            assert isinstance(packed, PackedLinear)
            assert torch.equal(packed.dequantize().to(dtype), weight)


def test_a_model_saved_between_is_the_same(tmp_path: Path) -> None:
    model = models.qwen2()
    batches = [{"input_ids": torch.randint(3, 80, (2, 24))}]
    grace.ptq.quantize(model, "gptq", batches, bits=3, group_size=-1, progress=False)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(3, 80, (1, 9))
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_result_repeats_wherever_calibration_waits(method: str) -> None:
    batch = inputs("qwen2_vl")
    weights = []
    for budget in (None, 0):
        model = made("qwen2_vl", num_hidden_layers=1)
        batches = [batch, {**batch, "pixel_values": batch["pixel_values"] * 0.5}]
        grace.ptq.quantize(
            model, method, batches, group_size=16, memory_budget=budget, progress=False
        )
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_awq_is_not_behind_llm_compressor_s() -> None:
    """tools/make_ptq_reference.py: a random decoder with channels that stand out."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    with np.load(REFERENCE) as stored:
        tensors = {
            name: torch.from_numpy(stored[name]) for name in stored.files if name != "version"
        }

    def model(prefix: str) -> nn.Module:
        fresh = transformers.LlamaForCausalLM(config).eval()
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        fresh.load_state_dict(state)
        return fresh

    tokens = tensors["tokens"]
    with torch.no_grad():
        exact = model("model/").model(input_ids=tokens).last_hidden_state

        def error(low: nn.Module) -> float:
            return float((low.model(input_ids=tokens).last_hidden_state - exact).norm())

        errors = {"llm-compressor": error(model("awq/"))}
        batches = [{"input_ids": row[None]} for row in tokens]
        for method in ("rtn", "gptq", "awq"):
            low = model("model/")
            grace.ptq.quantize(low, method, batches, group_size=32, progress=False)
            errors[method] = error(low)
    assert errors["awq"] <= 1.05 * errors["llm-compressor"]
    assert errors["awq"] < errors["rtn"]
    assert errors["gptq"] < errors["rtn"]


def test_skip_bits_and_progress() -> None:
    model = models.qwen2()
    batches = [{"input_ids": torch.randint(3, 80, (2, 24))}]
    told: list[tuple[int, int]] = []
    names = grace.ptq.quantize(
        model, "gptq", batches, bits=2, group_size=32, skip=["o_proj", r"layers\.1\."],
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert len(names) == 6
    assert told == [(done, 6) for done in range(1, 7)]
    assert {type(model.get_submodule(name)) for name in names} == {FakeQuantLinear}
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert {layer.bits for layer in model.modules() if isinstance(layer, FakeQuantLinear)} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "spqr"}, "method must be one of rtn, gptq, awq, got 'spqr'"),
        ({"method": "gptq"}, "gptq must have batches to calibrate with, got none"),
        ({"method": "awq", "batches": []}, "batches must hold something to calibrate with"),
        (
            {"method": "gptq", "batches": [torch.ones(1)]},
            "must be mappings of model inputs, got Te",
        ),
        ({"group_size": 48}, r"group_size must divide in_features 64"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"init": "luck"}, "init must be one of mse, p99, absmax, got 'luck'"),
        ({"method": "gptq", "batches": [], "damping": 0.0}, "damping must be above 0, got 0.0"),
        ({"act_order": True}, "act_order must be of gptq, got it with rtn"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(options: dict[str, Any], message: str) -> None:
    model = models.qwen2()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        grace.ptq.quantize(model, **{"group_size": 32, "progress": False, **options})
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_linears_that_nothing_reaches_are_rounded() -> None:
    model = models.qwen2()
    model.model.layers[0].extra = nn.Linear(64, 4)
    weight = model.model.layers[0].extra.weight.detach().clone()
    batches = [{"input_ids": torch.randint(3, 80, (2, 24))}]
    with pytest.warns(UserWarning, match=r"layers\.0\.extra saw no calibration"):
        names = grace.ptq.quantize(model, "gptq", batches, group_size=32, progress=False)
    assert "model.layers.0.extra" in names
    grid = Grid(4, 32, torch.bfloat16)
    layer = model.model.layers[0].extra
    assert torch.equal(layer.quantized_weight(), grid.nearest(weight, grid.find(weight)))
