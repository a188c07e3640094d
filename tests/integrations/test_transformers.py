"""from_pretrained on grace's layers, and beside transformers' own loader."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from packaging.version import Version
from packed_models import assert_same_files, packed_layers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.trainer_utils import validate_quantization_for_training
from transformers.utils import quantization_config as transformers_config

import grace
from grace.checkpoint import read_header
from grace.formats.compressed_tensors_config import Unsupported
from grace.integrations.compressed_tensors import PackedQuantizer, plan
from grace.nn import FakeQuantLinear

TOKENS = torch.arange(3, 27).view(2, 12)


def save_packed(
    model: Any, directory: Path, bits: int = 4, group_size: int = 32, **options: Any
) -> dict[str, Tensor]:
    """Packs and saves a model; gives the dequantized weights by name."""
    grace.quantize(model, bits=bits, group_size=group_size)
    grace.pack(model)
    model.save_pretrained(directory, **options)
    return {name: layer.dequantize() for name, layer in packed_layers(model).items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is without grace."""
    pytest.importorskip("compressed_tensors")
    config = transformers_config.CompressedTensorsConfig
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", config)
    quantizer = CompressedTensorsHfQuantizer
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", quantizer)


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where compressed-tensors is not installed."""
    for module in (transformers_config, transformers.quantizers.quantizer_compressed_tensors):
        monkeypatch.setattr(module, "is_compressed_tensors_available", lambda: False)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("no_package")
def test_from_pretrained_gives_the_packed_model(name: str, bits: int, tmp_path: Path):
    model = models.ALL[name]()
    weights = save_packed(model, tmp_path / "a", bits)
    loaded = type(model).from_pretrained(tmp_path / "a")
    layers = packed_layers(loaded)
    assert layers.keys() == weights.keys()
    for layer_name, layer in layers.items():
        assert torch.equal(layer.dequantize(), weights[layer_name])
        assert not hasattr(layer, "weight_packed")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
def test_group_sizes(group_size: int, tmp_path: Path):
    weights = save_packed(models.qwen2(), tmp_path, group_size=group_size)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, layer in packed_layers(loaded).items():
        assert layer.group_size == group_size
        assert torch.equal(layer.dequantize(), weights[name])


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(saved: torch.dtype, asked: Any, tmp_path: Path):
    """LLaVA: its names in files are not those in the model."""
    weights = save_packed(models.llava().to(saved), tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=asked)
    expected = saved if asked == "auto" else asked
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {expected}
    for name, layer in packed_layers(loaded).items():
        assert layer.scales.dtype == torch.bfloat16
        assert torch.equal(layer.dequantize(), weights[name])
    if expected != torch.float16:  # CLIP's attention on a CPU lacks it in places
        assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("scale_dtype", [torch.float16, None])
def test_scales_of_other_dtypes_are_kept(scale_dtype: torch.dtype | None, tmp_path: Path):
    """Published checkpoints have float16 scales; bfloat16 would change them."""
    model = models.llava()
    grace.quantize(model, group_size=32, scale_dtype=scale_dtype)
    grace.pack(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, layer in packed_layers(loaded).items():
        assert layer.scales.dtype == (scale_dtype or torch.float32)
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize())


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}])
def test_shards_tied_embeddings_and_device_maps(options: dict[str, Any], tmp_path: Path):
    model = models.qwen2(tie=True)
    save_packed(model, tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded.cpu()), logits(model))


def test_offloaded_layers_stay_packed_in_memory(tmp_path: Path):
    model = models.qwen2()
    save_packed(model, tmp_path / "a")
    places = {"model.layers.1": "disk", "lm_head": "disk"}
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    options = {"device_map": places | dict.fromkeys(rest, "cpu"), "offload_folder": tmp_path / "b"}
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "a", **options)
    assert not any(layer.qweight.is_meta for layer in packed_layers(loaded).values())
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"weights must be in memory, got model.layers.1"):
        load(tmp_path / "a", offload_buffers=True, **options)


def test_generates_and_compiles(tmp_path: Path):
    save_packed(models.qwen2(), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 16)
    assert torch.equal(tokens[:, 12], logits(model)[:, -1].argmax(-1))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=TOKENS).logits, logits(model))


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("stock")
def test_transformers_own_loader_reads_the_same_weights(name: str, bits: int, tmp_path: Path):
    model = models.ALL[name]().bfloat16()
    weights = save_packed(model, tmp_path, bits)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(loaded.hf_quantizer, CompressedTensorsHfQuantizer)
    assert not packed_layers(loaded)
    logits(loaded)  # decompresses
    for layer, weight in weights.items():
        assert torch.equal(loaded.get_submodule(layer).weight, weight.bfloat16()), layer
    dense = {n: p for n, p in loaded.named_parameters() if n.removesuffix(".weight") not in weights}
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(dense[parameter_name], parameter), parameter_name


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.usefixtures("stock")
def test_accelerate_takes_over_a_model_loaded_without_grace(group_size: int, tmp_path: Path):
    model = models.llava()
    weights = save_packed(model, tmp_path / "a", group_size=group_size)
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert grace.accelerate(loaded) == list(weights)
    for name, layer in packed_layers(loaded).items():
        assert torch.equal(layer.dequantize(), weights[name])
    torch.testing.assert_close(logits(loaded), logits(model))
    assert packed_layers(loaded).keys() == weights.keys()  # nothing was decompressed
    assert grace.accelerate(loaded) == []
    loaded.save_pretrained(tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b", but_for=kept_by_the_loader(loaded))


def kept_by_the_loader(model: Any) -> dict[str, torch.dtype]:
    """What transformers' loader may give another dtype than the file (5.24: the model's)."""
    later = Version(transformers.__version__) >= Version("5.24")
    return {".weight_scale": model.dtype} if later else {}


@pytest.mark.usefixtures("stock")
def test_accelerate_packs_the_head_where_it_is_asked_to(tmp_path: Path):
    model = models.llava()
    weights = save_packed(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="accelerate: lm_head_bits must be 8, got 4"):
        grace.accelerate(loaded, lm_head_bits=4)
    assert not packed_layers(loaded)
    assert grace.accelerate(loaded, lm_head_bits=8) == list(weights)
    head = packed_layers(loaded)["lm_head"]
    assert (head.bits, head.out_features) == (8, model.lm_head.out_features)
    error = (logits(loaded) - logits(model)).abs().max()
    assert 0 < error < 0.05 * logits(model).abs().max()


@pytest.mark.usefixtures("stock")
def test_accelerate_comes_before_the_first_forward(tmp_path: Path):
    save_packed(models.qwen2(), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    logits(model)
    with pytest.raises(ValueError, match="accelerate: model must not have run yet"):
        grace.accelerate(model)


def make_asymmetric(directory: Path) -> None:
    """The same weights, with zero points of zero: a format that grace does not run."""
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        zeros = torch.zeros_like(tensors[name], dtype=torch.int8)
        zero_points = package.pack_to_int32(zeros, 4, packed_dim=0)
        tensors[name.replace("_scale", "_zero_point")] = zero_points
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_weights(directory, symmetric=False)


def edit_weights(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.xfail(
    Version(transformers.__version__) >= Version("5.24"),
    reason="transformers 5.24 makes packed zero points anew: it expects them unpacked",
)
def test_zero_points_are_left_to_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = models.qwen2()
    weights = save_packed(model, tmp_path)
    make_asymmetric(tmp_path)
    with caplog.at_level(logging.INFO, "grace"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "symmetric must be True" in caplog.text
    assert isinstance(loaded.hf_quantizer, CompressedTensorsHfQuantizer)
    logits(loaded)
    for name, weight in weights.items():
        torch.testing.assert_close(loaded.get_submodule(name).weight, weight)
    assert grace.accelerate(models.qwen2()) == []


def test_dequantize_is_left_to_transformers(tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    weights = save_packed(models.qwen2(), tmp_path)
    asked = transformers.CompressedTensorsConfig(dequantize=True)
    kind = transformers.AutoModelForCausalLM
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = kind.from_pretrained(tmp_path, quantization_config=asked)
    assert not packed_layers(loaded)
    for name, weight in weights.items():  # transformers 5.24 rounds them to bfloat16
        torch.testing.assert_close(loaded.get_submodule(name).weight, weight, rtol=2**-8, atol=0)


def test_models_that_grace_cannot_hold_are_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fused experts and the like: found out with the model at hand, not from the config."""
    pytest.importorskip("compressed_tensors")

    def refuse(*_: object) -> None:
        raise Unsupported("experts must be linears of their own")

    weights = save_packed(models.llava().bfloat16(), tmp_path)
    monkeypatch.setattr("grace.integrations.compressed_tensors.plan", refuse)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded.hf_quantizer, PackedQuantizer)
    assert not packed_layers(loaded)
    logits(loaded)
    for name, weight in weights.items():
        assert torch.equal(loaded.get_submodule(name).weight, weight.bfloat16())


def test_plan_refuses_what_is_no_plain_linear(tmp_path: Path):
    model = models.qwen2(tie=True)
    save_packed(model, tmp_path)
    config = model.config.quantization_config
    tensors = read_header(tmp_path / "model.safetensors")
    fresh = models.qwen2(tie=True)
    assert len(plan(fresh, config, tensors)) == 14
    with pytest.raises(Unsupported, match="safetensors files must be there"):
        plan(fresh, config, {})
    with pytest.raises(Unsupported, match="lm_head must be an untied"):
        plan(fresh, {**config, "ignore": []}, tensors)
    experts = {**tensors, "model.layers.0.mlp.experts.0.up_proj.weight_packed": None}
    with pytest.raises(Unsupported, match="experts must be linears of their own"):
        plan(fresh, config, experts)
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    with pytest.raises(Unsupported, match=r"embed_tokens must be an untied nn.Linear"):
        plan(fresh, config, tensors)
    config["config_groups"]["group_0"]["weights"]["group_size"] = 48
    config["config_groups"]["group_0"]["targets"] = ["Linear"]
    with pytest.raises(Unsupported, match="must be -1 or divide 64, got 48"):
        plan(fresh, config, tensors)


@pytest.mark.usefixtures("no_package")
def test_without_the_package_transformers_says_what_it_needs(tmp_path: Path):
    save_packed(models.qwen2(), tmp_path)
    edit_weights(tmp_path, symmetric=False)
    with pytest.raises(ImportError, match="compressed-tensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def drop(directory: Path, ending: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("layers.1.mlp.up_proj.weight_scale", r"must hold .*layers.1.mlp.up_proj.weight_scale"),
        (("layers.0.self_attn.q_proj.weight_packed",), r"must hold .*q_proj.weight_packed"),
    ],
)
def test_missing_tensors_are_an_error(ending: Any, message: str, tmp_path: Path):
    model = models.llava()
    save_packed(model, tmp_path)
    drop(tmp_path, ending)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_missing_layer_is_an_error(tmp_path: Path):
    model = models.llava()
    save_packed(model, tmp_path)
    parts = ("packed", "scale", "shape")
    drop(tmp_path, tuple(f"layers.1.mlp.up_proj.weight_{part}" for part in parts))
    message = r"must hold 14 packed linears, got 13, without .*layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_wrong_group_size_is_an_error(tmp_path: Path):
    save_packed(models.qwen2(), tmp_path)
    edit_weights(tmp_path, group_size=16)
    with pytest.raises(ValueError, match=r"q_proj.weight_scale must be \[64, 4\].*got \[64, 2\]"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_file_is_an_error(tmp_path: Path):
    save_packed(models.qwen2(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors must have \d+ bytes, got \d+"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", models.ALL)
def test_a_model_in_training_is_loaded_as_it_was(name: str, tmp_path: Path):
    model = models.ALL[name]()
    names = grace.quantize(model, bits=3, group_size=16)
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert [n for n, m in loaded.named_modules() if isinstance(m, FakeQuantLinear)] == names
    assert torch.equal(logits(loaded), logits(model))
    for (_, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    loaded.save_pretrained(tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")
    validate_quantization_for_training(loaded)  # what a Trainer asks
    loaded.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert loaded.get_submodule(names[0]).log_scale.grad.abs().sum() > 0


def test_masters_keep_their_dtype(tmp_path: Path):
    """In bfloat16, weights would have other codes than those that were trained."""
    model = models.llava()
    names = grace.quantize(model, group_size=32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name in names:
        before, after = model.get_submodule(name), loaded.get_submodule(name)
        assert after.weight.dtype == after.log_scale.dtype == torch.float32
        assert torch.equal(before.quantize()[0], after.quantize()[0])
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert logits(loaded).dtype == torch.bfloat16


def test_a_damaged_training_checkpoint_is_an_error(tmp_path: Path):
    model = models.qwen2()
    grace.quantize(model, group_size=32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["groups"][0]["group_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ValueError, match=r"q_proj.log_scale must be \[64, 1\] for group size 64"):
        load(tmp_path)
    drop(tmp_path, "q_proj.log_scale")
    with pytest.raises(ValueError, match="must hold 14 log_scale tensors, got 12"):
        load(tmp_path)
    config["quantization_config"]["groups"][0].pop("bits")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="groups must have bits, group_size"):
        load(tmp_path)


def test_import_grace_is_enough_and_light(tmp_path: Path):
    save_packed(models.qwen2(), tmp_path)
    code = f"""
import sys, grace
assert not {{"torch", "transformers"}} & set(sys.modules), "import grace is not light"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
