"""Configs of checkpoints: what we write selects the right layers, by the package's rules too."""

from __future__ import annotations

import copy
import re
from typing import Any

import models
import pytest
from torch import nn

from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import Unsupported, make_config, read_config
from grace.quantization import decoder_linears

W4, W8 = Scheme(4, 32), Scheme(8, -1)


def config_of(model: nn.Module, schemes: dict[str, Scheme]) -> dict[str, Any]:
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return make_config(schemes, [name for name in linears if name not in schemes])


def selected(model: nn.Module, config: dict[str, Any]) -> dict[str, Scheme]:
    layout = read_config(config)
    found = {n: layout.scheme_of(n, ["Linear"]) for n, m in model.named_modules() if is_linear(m)}
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def selected_by_package(model: nn.Module, config: dict[str, Any]) -> dict[str, Scheme]:
    """What compressed-tensors' own loader would quantize, and how."""
    package = pytest.importorskip("compressed_tensors.quantization")
    package.apply_quantization_config(model, package.QuantizationConfig.model_validate(config))
    schemes = {
        name: module.quantization_scheme.weights
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    return {n: Scheme(w.num_bits, w.group_size or -1) for n, w in schemes.items()}


@pytest.mark.parametrize("name", models.ALL)
def test_config_selects_the_decoder_linears(name: str):
    model = models.ALL[name]()
    schemes = dict.fromkeys(decoder_linears(model), W4)
    config = config_of(model, schemes)
    assert selected(model, config) == schemes
    assert selected_by_package(model, config) == schemes
    assert all(entry.startswith("re:.*") for entry in config["ignore"])


def test_ignore_names_whole_containers():
    llava = models.llava()
    config = config_of(llava, dict.fromkeys(decoder_linears(llava), W4))
    assert config["ignore"] == [
        "re:.*vision_tower.*",
        "re:.*multi_modal_projector.*",
        "re:.*lm_head",
    ]
    qwen = models.qwen2_vl()
    config = config_of(qwen, dict.fromkeys(decoder_linears(qwen), W4))
    assert config["ignore"] == ["re:.*visual.*", "re:.*lm_head"]
    assert config["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": None,
        "output_activations": None,
    }


@pytest.mark.parametrize("dense", [r"down_proj", r"layers\.1\.", r"layers\.0\.mlp\.", "self_attn"])
def test_skipped_and_mixed_layers_are_selected(dense: str):
    model = models.llava()
    names = list(decoder_linears(model))
    schemes = {name: W4 for name in names if not re.search(dense, name)}
    config = config_of(model, schemes)
    assert selected(model, config) == schemes
    mixed = {name: W8 if re.search(dense, name) else W4 for name in names}
    config = config_of(model, mixed)
    assert selected(model, config) == mixed
    assert selected_by_package(model, config) == mixed


def test_patterns_tell_layer_1_from_layer_10():
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(21)]
    schemes = {name: W4 for name in names if name != "model.layers.1.mlp.down_proj"}
    config = make_config(schemes, ["model.layers.1.mlp.down_proj", "lm_head"])
    layout = read_config(config)
    assert {name for name in names if layout.scheme_of(name, ["Linear"])} == set(schemes)


def test_fused_layers_must_share_a_scheme():
    with pytest.raises(ValueError, match=r"q_proj, k_proj, v_proj must share"):
        make_config({"a.q_proj": W4, "a.k_proj": W8, "a.v_proj": W4}, [])
    with pytest.raises(ValueError, match=r"gate_proj, up_proj must share"):
        make_config({"a.gate_proj": W4}, ["a.up_proj"])
    with pytest.raises(ValueError, match="must have quantized linears, got none"):
        make_config({}, ["lm_head"])


CHANGES = [
    ({"format": "int-quantized"}, "format must be pack-quantized"),
    ({"quantization_status": "frozen"}, "quantization_status must be compressed"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be empty"),
    ({"transform_config": {"config_groups": {"a": {}}}}, "transform_config must be empty"),
    ({"config_groups": {}}, "must have targets"),
]
WEIGHT_CHANGES = [
    ({"symmetric": False}, "symmetric must be True"),
    ({"type": "float"}, "type must be int"),
    ({"num_bits": 3}, "num_bits must be 4 or 8"),
    ({"actorder": "group"}, "actorder must be null"),
    ({"strategy": "tensor", "group_size": None}, "by group or channel"),
    ({"strategy": "block", "group_size": None}, "by group or channel"),
]


def example() -> dict[str, Any]:
    return make_config({"layers.0.q_proj": W4}, ["lm_head"])


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_we_do_not_run_is_unsupported(change: dict[str, Any], message: str):
    with pytest.raises(Unsupported, match=message):
        read_config({**example(), **change})


@pytest.mark.parametrize(("change", "message"), WEIGHT_CHANGES)
def test_weights_we_do_not_run_are_unsupported(change: dict[str, Any], message: str):
    config = copy.deepcopy(example())
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(Unsupported, match=message):
        read_config(config)


def test_activations_are_unsupported():
    config = copy.deepcopy(example())
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(Unsupported, match="input_activations must be null"):
        read_config(config)


def test_a_config_as_other_tools_write_it_is_read():
    """llm-compressor writes more keys, leaves the strategy out, and may give a format a group."""
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.14.0",
        "format": "pack-quantized",
        "sparsity_config": {},
        "transform_config": {},
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "group_size": 128,
                    "observer": "mse",
                    "actorder": "weight",
                },
            }
        },
    }
    layout = read_config(config)
    assert layout.scheme_of("model.layers.0.mlp.up_proj", ["Linear"]) == Scheme(4, 128)
    assert layout.scheme_of("lm_head", ["Linear"]) is None
