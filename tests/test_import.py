"""Checkpoints in other programs' formats: written by `grace export`, taken back by `import`."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import unpacked
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

import grace
from grace import shards
from grace.checkpoint import Checkpoint
from grace.cli import main
from grace.importing import import_published
from grace.nn import FakeQuantLinear, PackedLinear

CASES = [
    ("awq", "qwen2", 4, 32),
    ("awq", "llava", 4, -1),
    ("gptq", "qwen2_vl", 4, 32),
    ("gptq", "qwen3_vl", 8, 32),
    ("compressed-tensors", "llava", 8, -1),
    ("compressed-tensors", "qwen2_5_vl", 4, 64),
]


def quantized(name: str = "qwen2", **options: Any) -> Any:
    model = models.ALL[name]().to(torch.bfloat16)
    grace.quantize(model, **{"group_size": 32, **options})
    return model


def layers_of(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every quantized linear, by its name on disk."""
    tensors = dict(Checkpoint(directory).read())
    stems = [name.rpartition(".")[0] for name in tensors if name.endswith("weight_packed")]
    stems += [name.rpartition(".")[0] for name in tensors if name.endswith("qweight")]
    return {
        stem: {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(stem + ".")}
        for stem in stems
    }


def inner(name: str) -> str:
    """A name without what differs on disk and in the model."""
    return name[name.index("layers.") :]


def numbers(format: str, tensors: dict[str, Tensor], bits: int) -> tuple[Any, Any]:
    if format == "awq":
        return unpacked.awq(tensors)
    unpack = unpacked.gptq if format == "gptq" else unpacked.compressed
    return unpack(tensors, bits)


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def listing(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


@pytest.mark.parametrize(("format", "name", "bits", "group_size"), CASES)
def test_there_and_back(format: str, name: str, bits: int, group_size: int, tmp_path: Path):
    model = quantized(name, bits=bits, group_size=group_size)
    out, back = tmp_path / "out", tmp_path / "back"
    certificate = grace.export(model, out, format, max_shard_size="60KB")
    assert certificate.ok
    assert certificate.quantized_layers == 14
    imported = import_published(out, back, max_shard_size="60KB")
    assert imported.quantized_layers == 14
    assert imported.codes == certificate.codes
    assert "model.safetensors.index.json" in listing(out) & listing(back)
    there, again = layers_of(out), layers_of(back)
    assert there.keys() == again.keys()
    trained = {inner(n): m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    assert {inner(stem) for stem in there} == trained.keys()
    for stem, tensors in there.items():
        layer = trained[inner(stem)]
        codes, scales = (tensor.tolist() for tensor in layer.quantize())
        assert numbers(format, tensors, bits) == (codes, scales), stem
        assert numbers("compressed-tensors", again[stem], bits) == (codes, scales), stem
        assert again[stem]["weight_scale"].dtype == torch.bfloat16
    loaded = type(model).from_pretrained(back, dtype=torch.float32)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, FakeQuantLinear):
            packed = loaded.get_submodule(layer_name)
            assert isinstance(packed, PackedLinear)
            assert torch.equal(packed.dequantize(torch.bfloat16), layer.quantized_weight())
    assert listing(tmp_path) == {"out", "back"}
    # One way and the other give one checkpoint.
    grace.export(model, tmp_path / "direct", max_shard_size="60KB")
    direct = dict(Checkpoint(tmp_path / "direct").read())
    assert direct.keys() == dict(Checkpoint(back).read()).keys()
    assert all(torch.equal(tensor, direct[key]) for key, tensor in Checkpoint(back).read())


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("skip", [(), ("o_proj",), (r"layers\.1\.",)])
def test_servers_see_what_is_not_quantized(name: str, skip: tuple[str, ...]):
    """By the rules of transformers and vLLM (AWQ), and of vLLM, SGLang and GPTQModel (GPTQ)."""
    from grace.formats.layouts import AWQ, GPTQ
    from grace.quantization import packed_config

    model = models.ALL[name]()
    grace.quantize(model, group_size=32, skip=skip)
    kept = packed_config(model, AWQ)["modules_to_not_convert"]
    skipped = [rule.removeprefix("-:") for rule in packed_config(model, GPTQ)["dynamic"]]
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear | FakeQuantLinear):
            dense = not isinstance(module, FakeQuantLinear)
            assert should_convert_module(module_name, kept) != dense, module_name
            assert any(part in module_name for part in kept) == dense, module_name
            assert any(re.match(rule, module_name) for rule in skipped) == dense, module_name


@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_configs_are_those_that_servers_read(format: str, tmp_path: Path):
    grace.export(quantized("qwen2_vl"), tmp_path / "out", format)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    meta = written.pop("meta", None)
    if format == "awq":
        assert written == {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["visual", "model.visual", "lm_head"],
        }
        return
    assert meta == {"quantizer": [f"grace:{grace.__version__}"]}
    assert written == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "dynamic": {"-:.*visual.*": {}, "-:.*lm_head": {}},
    }


@pytest.mark.parametrize(
    ("options", "format", "message"),
    [
        ({"scale_dtype": None}, "awq", r"scales of .*q_proj must be exact in float16"),
        ({"scale_dtype": None}, "gptq", r"scales of .*q_proj must be exact in float16"),
        ({"bits": 8}, "awq", "awq: bits must be 4, got 8"),
        ({"overrides": {"o_proj": {"bits": 8}}}, "gptq", "must be there and share bits"),
        ({"skip": "k_proj"}, "awq", "q_proj, k_proj, v_proj must share"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    options: dict, format: str, message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        grace.export(quantized(**options), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


Q_PROJ = "model.layers.1.self_attn.q_proj"


def rewritten(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def flip(name: str, bit: int) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[5] ^= 1 << bit

    return change


@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_verify_finds_every_difference(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, out = quantized(), tmp_path / "out"
    model.save_pretrained(tmp_path / "trained")
    grace.export(model, out, format)
    assert run("verify", out, tmp_path / "trained") == 0
    whole = (out / "model.safetensors").read_bytes()
    for part, difference in (
        ("qweight", "codes differ"),
        ("scales", "scales differ"),
        ("qzeros", "zero points are not all those of 8"),
        ("g_idx", "g_idx is not k // group_size"),
    ):
        if part == "g_idx" and format == "awq":
            continue
        rewritten(out, flip(f"{Q_PROJ}.{part}", 0))
        assert run("verify", out, tmp_path / "trained") == 1
        written = json.loads((out / "grace_certificate.json").read_text())
        assert written["ok"] is False
        assert written["differences"][:1] == [f"{Q_PROJ}: {difference}"]
        (out / "model.safetensors").write_bytes(whole)
    config = (out / "config.json").read_text()
    set_config(out, group_size=64)
    differences = grace.export.verify(out, model).differences
    assert f"{Q_PROJ}: config says Scheme(bits=4, group_size=64)" in differences
    (out / "config.json").write_text(config)
    certificate = grace.export.verify(out, model)
    assert certificate.ok
    assert certificate.logits.tokens == 32
    assert certificate.logits.relative_error < 0.02
    assert run("import", out, tmp_path / "packed") == 0
    assert "14 quantized layers (73728 codes) and 13 other" in capsys.readouterr().out
    assert run("verify", tmp_path / "packed", out) == 0  # the reference in the other format
    rewritten(out, lambda tensors: tensors.pop(f"{Q_PROJ}.scales"))
    assert (
        f"{Q_PROJ}.scales: missing in the checkpoint" in grace.export.verify(out, model).differences
    )


@pytest.fixture(scope="module", params=["awq", "gptq", "compressed-tensors"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "src"
    grace.export(quantized(), directory, request.param)
    return directory


@pytest.fixture
def exported(original: Path, tmp_path: Path) -> Path:
    """A checkpoint of each format, to be damaged."""
    return shutil.copytree(original, tmp_path / "src")


def set_config(directory: Path, **change: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(change)
    file.write_text(json.dumps(config))


def truncate(source: Path) -> None:
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 9)


def flip_config(source: Path) -> None:
    content = bytearray((source / "config.json").read_bytes())
    content[0] ^= 1
    (source / "config.json").write_bytes(bytes(content))


def other_size(source: Path) -> None:
    """A digit of the hidden size flipped: still JSON, no longer this model's."""
    text = (source / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 68')
    (source / "config.json").write_text(text)


def lose(ending: str) -> Any:
    def change(source: Path) -> None:
        def drop(tensors: dict[str, Tensor]) -> None:
            name = next(name for name in sorted(tensors) if name.endswith(ending))
            del tensors[name]

        rewritten(source, drop)

    return change


def other_groups(source: Path) -> None:
    group = {"weights": {"num_bits": 4, "group_size": 16}, "targets": ["Linear"]}
    if "config_groups" in json.loads((source / "config.json").read_text())["quantization_config"]:
        set_config(source, config_groups={"group_0": group})
    else:
        set_config(source, group_size=16)


FAULTS = [
    (truncate, "model.safetensors must have"),
    (flip_config, "config.json must be JSON"),
    (other_size, r"must be .*, got|must describe a"),
    (
        lose(("weight_scale", "scales")),
        "must be there, got no such tensor|must hold .*weight_scale",
    ),
    (lose("model.norm.weight"), "must hold the whole model, got no model.norm.weight"),
    (other_groups, r"(scales|qzeros|weight_scale) must be"),
    (lambda source: (source / "x.bin").write_bytes(b""), "must hold no pickles, got x.bin"),
    (lambda source: set_config(source, quant_method="exl2"), "must be quantized by .*got exl2"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_damage_is_told_and_nothing_is_written(
    exported: Path,
    fault: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    fault(exported)
    assert run("import", exported, tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, told), told
    assert listing(tmp_path) == {"src"}


def test_any_flipped_bit_of_the_config_is_read_or_told(original: Path, tmp_path: Path):
    source, out = shutil.copytree(original, tmp_path / "src"), tmp_path / "out"
    content = (source / "config.json").read_bytes()
    told = 0
    for place in range(7, len(content), len(content) // 8):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        (source / "config.json").write_bytes(bytes(flipped))
        try:
            import_published(source, out, overwrite=True)
        except (ValueError, OSError):
            told += 1
        assert listing(tmp_path) <= {"src", "out"}
    assert told


def test_a_full_disk_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch, capsys):
    save, calls = shards.save_file, []

    def full(*arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        save(*arguments, **named)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[1]))

    monkeypatch.setattr(shards, "save_file", full)
    assert run("import", exported, tmp_path / "out", "--max-shard-size", "50KB") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len(calls) == 2
    assert listing(tmp_path) == {"src"}
    calls.clear()
    with pytest.raises(OSError, match="No space left on device"):
        grace.export(quantized(), tmp_path / "new", "awq", max_shard_size="50KB")
    assert listing(tmp_path) == {"src"}


def test_asymmetric_and_act_ordered_ones_are_refused(exported: Path, tmp_path: Path):
    method = json.loads((exported / "config.json").read_text())["quantization_config"]
    if method["quant_method"] == "compressed-tensors":
        zeros = torch.zeros(64, 1, dtype=torch.int32)
        rewritten(exported, lambda tensors: tensors.update({f"{Q_PROJ}.weight_zero_point": zeros}))
        message = "q_proj must be symmetric, without zero points"
    else:
        rewritten(exported, flip(f"{Q_PROJ}.qzeros", 0))
        message = r"zero points of .*q_proj must all be \d \(symmetric\), got others"
    with pytest.raises(ValueError, match=message):
        import_published(exported, tmp_path / "out")
    assert listing(tmp_path) == {"src"}


def test_companions_come_along_and_targets_are_respected(exported: Path, tmp_path: Path):
    (exported / "chat_template.jinja").write_text("{{ messages }}")
    (exported / "tokenizer_config.json").write_text("{}")
    import_published(exported, tmp_path / "out")
    expected = {"chat_template.jinja", "tokenizer_config.json", "generation_config.json"}
    assert expected < listing(tmp_path / "out")
    with pytest.raises(ValueError, match="must be new or empty"):
        import_published(exported, tmp_path / "out")
    with pytest.raises(ValueError, match="dst must not hold src"):
        import_published(exported, exported, overwrite=True)
    assert import_published(exported, tmp_path / "out", overwrite=True).ok


def released(model: Any, directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The authors' layout: bfloat16 weights on an fp32 grid, the log-scales in a pickle."""
    grid, expected = {}, {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, FakeQuantLinear):
            continue
        log_scale = module.log_scale.detach().clone()
        codes, scales = module.quantize()
        product = codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        dense.weight.data = product.flatten(1).to(torch.bfloat16)
        if module.bias is not None:
            dense.bias.data = module.bias.data
        model.set_submodule(name, dense)
        grid |= {f"{name}.weight": dense.weight.data, f"{name}.log_scale": log_scale.view(-1)}
        expected[name] = (codes, scales)
    del model.config.quantization_config
    model.save_pretrained(directory)
    torch.save(grid, directory / "qat_quantized_weights.bin")
    return expected


def test_released_weights_on_a_grid(tmp_path: Path):
    source, out = tmp_path / "src", tmp_path / "out"
    expected = released(quantized("qwen3_vl", scale_dtype=None), source)
    assert import_published(source, out).quantized_layers == 14
    layers = layers_of(out)
    assert layers.keys() == expected.keys()
    for name, (codes, scales) in expected.items():
        assert numbers("compressed-tensors", layers[name], 4) == (codes.tolist(), scales.tolist())
    grid = torch.load(source / "qat_quantized_weights.bin", weights_only=True)
    name = next(iter(expected))
    grid[f"{name}.log_scale"] += 0.01
    torch.save(grid, source / "qat_quantized_weights.bin")
    with pytest.raises(ValueError, match=rf"{name}.weight must lie on its log_scale's grid"):
        import_published(source, tmp_path / "other")
    assert listing(tmp_path) == {"src", "out"}


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    released(quantized(scale_dtype=None), tmp_path / "src")
    torch.save({"a.log_scale": _Evil()}, tmp_path / "src" / "qat_quantized_weights.bin")
    with pytest.raises(ValueError, match=r"qat_quantized_weights.bin must hold tensors alone"):
        import_published(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "qat_quantized_weights.bin").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"qat_quantized_weights.bin must hold tensors alone"):
        import_published(tmp_path / "src", tmp_path / "out")
    assert listing(tmp_path) == {"src"}


def test_released_awq(tmp_path: Path):
    """AWQ tensors; settings and names in a list beside them; no quantization_config."""
    source, model = tmp_path / "src", quantized("qwen3_vl")
    grace.export(model, source, "awq")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    config["awq_packing"] = {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": 8}
    (source / "config.json").write_text(json.dumps(config))
    names = list(layers_of(source))
    listed = {"bits": 4, "group_size": 32, "modules": names}
    (source / "awq_quantized_modules.json").write_text(json.dumps(listed))
    assert import_published(source, tmp_path / "out").quantized_layers == 14
    assert "awq_packing" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert grace.export.verify(tmp_path / "out", model).ok
    listed["modules"] = names[1:]
    (source / "awq_quantized_modules.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="must list the quantized linears of the checkpoint"):
        import_published(source, tmp_path / "other")
    assert listing(tmp_path) == {"src", "out"}


def as_original(directory: Path) -> None:
    """A transformers LLaVA's files under the names and with the config of LLaVA's first code."""
    names = {
        "language_model.model.": "model.",
        "language_model.lm_head": "lm_head",
        "multi_modal_projector.linear_1": "model.mm_projector.0",
        "multi_modal_projector.linear_2": "model.mm_projector.2",
        "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }

    def original(name: str) -> str:
        new, old = next((new, old) for new, old in names.items() if name.startswith(new))
        return old + name.removeprefix(new)

    tensors = load_file(directory / "model.safetensors")
    tensors = {original(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())["text_config"]
    config = {**text, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    config |= {"mm_projector_type": "mlp2x_gelu", "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    linears = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    listed = {"bits": 4, "group_size": 32, "modules": linears}
    (directory / "awq_quantized_modules.json").write_text(json.dumps(listed))


def test_original_llava_names(tmp_path: Path):
    model = quantized("llava")
    grace.export(model, tmp_path / "src", "awq")
    as_original(tmp_path / "src")
    assert import_published(tmp_path / "src", tmp_path / "out").quantized_layers == 14
    loaded, info = type(model).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.image_token_id == 96
    assert loaded.config.text_config.vocab_size == 128
    assert loaded.config.vision_config.image_size == 32
    assert loaded.generation_config.suppress_tokens == list(range(96, 128))
    assert not loaded.lm_head.weight[96:].any()
    state = loaded.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, FakeQuantLinear):
            packed = loaded.get_submodule(name)
            assert torch.equal(packed.dequantize(torch.bfloat16), layer.quantized_weight())
        for part, tensor in layer.named_parameters(recurse=False):
            if not isinstance(layer, FakeQuantLinear):
                own = state[f"{name}.{part}"][: tensor.shape[0]]
                assert torch.equal(own, tensor.float()), name
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if "vision_tower" not in name}
    save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"src must hold the vision tower"):
        import_published(tmp_path / "src", tmp_path / "other")
    assert listing(tmp_path) == {"src", "out"}
