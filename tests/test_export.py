from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import grace
from grace.certificate import Certificate
from grace.nn import FakeQuantLinear, PackedLinear

TOKENS = {"input_ids": torch.arange(3, 27).view(2, 12)}


def quantized(name: str = "qwen2", **options: Any) -> Any:
    model = models.ALL[name]()
    grace.quantize(model, **{"group_size": 32, **options})
    return model


def listing(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("bits", [4, 8])
def test_exported_model_is_the_trained_one(name: str, bits: int, tmp_path: Path):
    model = quantized(name, bits=bits)
    model.train()
    config = dict(model.config.quantization_config)
    certificate = grace.export(model, tmp_path / "out", inputs=TOKENS)
    assert certificate.ok
    assert certificate.quantized_layers == 14
    layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    assert certificate.codes == sum(layer.weight.numel() for layer in layers)
    assert certificate.logits.tokens == 24
    assert certificate.logits.relative_error < 1e-5
    # The source is as it was, in training.
    assert model.training
    assert model.config.quantization_config == config
    assert any(isinstance(m, FakeQuantLinear) for m in model.modules())
    loaded = type(model).from_pretrained(tmp_path / "out")
    for layer_name, layer in model.named_modules():
        if isinstance(layer, FakeQuantLinear):
            packed = loaded.get_submodule(layer_name)
            assert isinstance(packed, PackedLinear)
            assert torch.equal(packed.dequantize(), layer.quantized_weight())
    assert listing(tmp_path) == {"out"}


@pytest.mark.parametrize("name", ["qwen2", "llava"])
def test_from_directories_as_from_memory(name: str, tmp_path: Path):
    model = quantized(name)
    model.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "trained" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "trained" / "optimizer.pt").write_text("not a weight")
    grace.export(model, tmp_path / "a")
    grace.export(tmp_path / "trained", tmp_path / "b", max_shard_size=30_000)
    grace.export(tmp_path / "b", tmp_path / "c")
    first = load_file(tmp_path / "a" / "model.safetensors")
    third = load_file(tmp_path / "c" / "model.safetensors")
    assert first.keys() == third.keys()
    assert all(torch.equal(first[key], third[key]) for key in first)
    assert "model.safetensors.index.json" in listing(tmp_path / "b")
    extra = {"tokenizer_config.json", "chat_template.jinja"}
    assert listing(tmp_path / "c") == listing(tmp_path / "a") | extra


def test_dtype_is_for_what_is_not_quantized(tmp_path: Path):
    model = quantized("qwen2_vl")  # tied: the embedding is cast once
    certificate = grace.export(model, tmp_path / "out", dtype=torch.bfloat16)
    assert certificate.ok
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {t.dtype for t in tensors.values()}
    assert kinds == {torch.bfloat16, torch.int32, torch.int64}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_certificate_says_what_was_compared(tmp_path: Path):
    grace.export(quantized(), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "grace_certificate.json").read_text())
    assert written["ok"] is True
    assert written["differences"] == []
    assert written["quantized_layers"] == 14
    assert written["logits"]["top1_agreement"] == 1.0
    assert written["files"].keys() == {"model.safetensors", "config.json"}
    assert written["versions"]["torch"] == torch.__version__


def tampered(directory: Path, name: str, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def one_code(words: torch.Tensor) -> torch.Tensor:
    words[3, 1] ^= 1 << 20
    return words


Q_PROJ = "model.layers.1.self_attn.q_proj"
TAMPERED = [
    (f"{Q_PROJ}.weight_packed", one_code, f"{Q_PROJ}: codes differ"),
    (f"{Q_PROJ}.weight_scale", lambda t: t * 1.01, f"{Q_PROJ}: scales differ"),
    (f"{Q_PROJ}.weight_scale", lambda t: t.float(), f"{Q_PROJ}: scales differ"),
    (f"{Q_PROJ}.weight_shape", lambda t: t + 8, f"{Q_PROJ}: weight_shape is [72, 72]"),
    (f"{Q_PROJ}.bias", lambda t: t + 1e-6, f"{Q_PROJ}.bias: values differ"),
    ("model.norm.weight", lambda t: t * 2, "model.norm.weight: values differ"),
]


@pytest.mark.parametrize(("name", "change", "difference"), TAMPERED)
def test_every_difference_is_found(name: str, change: Any, difference: str, tmp_path: Path):
    model = quantized()
    grace.export(model, tmp_path / "out")
    tampered(tmp_path / "out", name, change)
    certificate = grace.export.verify(tmp_path / "out", model)
    assert not certificate.ok
    assert difference in certificate.differences
    assert json.loads((tmp_path / "out" / "grace_certificate.json").read_text())["ok"] is False


def test_lost_and_added_tensors_are_found(tmp_path: Path):
    model = quantized()
    grace.export(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    tensors["odd"] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    differences = grace.export.verify(tmp_path / "out", model).differences
    assert "lm_head.weight: missing in the checkpoint" in differences
    assert "odd: unknown to the reference, in the checkpoint" in differences


def test_another_scheme_in_the_config_is_found(tmp_path: Path):
    model = quantized()
    grace.export(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    file.write_text(json.dumps(config))
    differences = grace.export.verify(tmp_path / "out", model).differences
    assert any("config says Scheme(bits=4, group_size=16)" in text for text in differences)


def test_a_kernel_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = quantized()
    grace.export(model, tmp_path / "out")
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: right(self, x) * 1.01)
    certificate = grace.export.verify(tmp_path / "out", model)
    assert certificate.differences[0].startswith("logits differ")
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: right(self, x) * torch.nan)
    assert not grace.export.verify(tmp_path / "out", model).ok


def test_files_are_compared_with_their_certificate(tmp_path: Path):
    grace.export(quantized(), tmp_path / "out")
    certificate = grace.export.verify(tmp_path / "out")
    assert certificate.ok
    assert certificate.summary() == "2 files are as certified"
    tampered(tmp_path / "out", "lm_head.weight", lambda t: t + 1)
    differences = grace.export.verify(tmp_path / "out").differences
    assert differences == ["model.safetensors: sha256 differs from the certificate's"]


def test_nothing_is_left_of_a_failed_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = quantized()
    grace.export(model, tmp_path / "out")
    before = listing(tmp_path / "out")
    wrong = Certificate(differences=["it differs"])
    monkeypatch.setattr("grace.export.verify", lambda *_, **__: wrong)
    with pytest.raises(RuntimeError, match="checkpoint differs from src: it differs"):
        grace.export(model, tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == {"out"}
    assert listing(tmp_path / "out") == before
    with pytest.raises(RuntimeError):
        grace.export(model, tmp_path / "new")
    assert listing(tmp_path) == {"out"}


def test_existing_directories_are_not_touched(tmp_path: Path):
    model = quantized()
    grace.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="must be new or empty"):
        grace.export(model, tmp_path / "out")
    assert grace.export(model, tmp_path / "out", overwrite=True).ok
    with pytest.raises(ValueError, match="dst must not hold src"):
        grace.export(tmp_path / "out", tmp_path / "out", overwrite=True)
    assert grace.export.verify(tmp_path / "out", model).ok


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (quantized, {"format": "gguf"}, "format must be one of .*awq, gptq, got gguf"),
        (models.qwen2, {}, "must hold FakeQuantLinear or PackedLinear layers, got none"),
        (lambda: quantized(bits=2), {}, r"export: bits of .*q_proj must be 4 or 8, got 2"),
        (lambda: quantized(skip="q_proj"), {}, "q_proj, k_proj, v_proj must share"),
        (lambda: nn.Linear(2, 2), {}, "must be a transformers model, got Linear"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, options: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        grace.export(model(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_bad_sources_are_refused(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    with pytest.raises(NotADirectoryError, match="must be a directory, got nothing"):
        grace.export(source, out)
    quantized().save_pretrained(source)
    file = source / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors must"):
        grace.export(source, out)
    file.write_bytes(content)
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold the whole model, got no model.norm.weight"):
        grace.export(source, out)
    file.rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be safetensors, got the pickle"):
        grace.export(source, out)
    assert listing(tmp_path) == {"source"}


def test_pickles_in_a_checkpoint_are_refused(tmp_path: Path):
    model = quantized()
    grace.export(model, tmp_path / "out")
    (tmp_path / "out" / "extra.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"verify: dst must hold no pickles, got extra.bin"):
        grace.export.verify(tmp_path / "out", model)
