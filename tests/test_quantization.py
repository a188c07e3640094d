from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import grace
from grace.nn import FakeQuantLinear, PackedLinear
from grace.quantization import decoder_linears

PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TEXT_LAYERS = {"qwen2": "model.layers."}


def named(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", models.ALL)
def test_decoder_linears_and_nothing_else_are_quantized(name: str):
    model = models.ALL[name]()
    parameters = {n: p for n, p in model.named_parameters()}  # noqa: C416 (a copy of the view)
    names = grace.quantize(model, bits=4, group_size=32)
    layers = TEXT_LAYERS.get(name, "model.language_model.layers.")
    assert {n.rsplit(".", 1)[1] for n in names} == PARTS
    assert len(names) == 2 * len(PARTS)
    assert all(n.startswith(layers) for n in names)
    assert named(model, FakeQuantLinear) == names
    after = {n: p for n, p in model.named_parameters() if not n.endswith("log_scale")}
    assert after.keys() == parameters.keys()
    assert all(after[n] is parameters[n] for n in after)


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_model_has_the_same_weights_and_logits(name: str, bits: int):
    model = models.ALL[name]()
    names = grace.quantize(model, bits=bits, group_size=32)
    expected = {n: model.get_submodule(n).quantized_weight() for n in names}
    tokens = torch.randint(3, 80, (2, 9))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        assert grace.pack(model) == names
        after = model(input_ids=tokens).logits
    assert named(model, PackedLinear) == names
    assert not named(model, FakeQuantLinear)
    assert all(torch.equal(model.get_submodule(n).dequantize(), w) for n, w in expected.items())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


class OldStyle(nn.Module):
    """A model that transformers does not know: decoder a level below, other linears around."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList(nn.Linear(16, 16) for _ in range(9))
        self.text = nn.Module()
        self.text.embedding = nn.Embedding(10, 16)
        self.text.decoder = nn.Module()
        self.text.decoder.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(3))
        self.head = nn.Linear(16, 10)


def test_any_module_with_embedding_and_layers_will_do():
    model = OldStyle()
    names = grace.quantize(model, group_size=16)
    assert names == [f"text.decoder.blocks.{i}.0" for i in range(3)]
    assert grace.pack(model) == names


def test_skip_leaves_layers_as_they_are():
    model = models.llava()
    names = grace.quantize(model, group_size=32, skip=[r"layers\.0\.", "o_proj"])
    assert len(names) == 6
    assert not any("layers.0." in name or "o_proj" in name for name in names)
    rest = grace.quantize(model, bits=8, group_size=-1, skip="k_proj")
    assert len(rest) == 7
    assert len(decoder_linears(model)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"group_size": 48}, r"quantize: .*q_proj: group_size must divide in_features 64"),
        ({"group_size": 128}, r"quantize: .*group_size must divide in_features 64"),
        ({"group_size": 32, "init": "luck"}, "method must be one of"),
        ({"group_size": 32, "skip": ["nothing"]}, "skip must match linears of the model"),
        ({"group_size": 32, "skip": "layers"}, "skip must leave linears to quantize"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(options: dict, message: str):
    model = models.qwen2()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        grace.quantize(model, **options)
    assert dict(model.named_modules()) == before
    assert not hasattr(model.config, "quantization_config")


def test_models_without_decoder_layers_are_refused():
    with pytest.raises(ValueError, match="must have a token embedding, got Sequential"):
        grace.quantize(nn.Sequential(nn.Linear(16, 16)), group_size=16)
    model = nn.Sequential(nn.Embedding(4, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="must have a ModuleList of decoder layers"):
        grace.quantize(model, group_size=16)


def test_a_quantized_model_is_not_quantized_again():
    model = models.qwen2()
    grace.quantize(model, group_size=32)
    with pytest.raises(ValueError, match="got them all quantized"):
        grace.quantize(model, group_size=32)
    grace.pack(model)
    with pytest.raises(ValueError, match="got them all quantized"):
        grace.quantize(model, group_size=32)


def test_only_4_and_8_bits_are_packed():
    model = models.qwen2()
    with pytest.raises(ValueError, match="must hold FakeQuantLinear layers, got none"):
        grace.pack(model)
    names = grace.quantize(model, bits=2, group_size=32)
    with pytest.raises(ValueError, match=r"bits of model.layers.0.self_attn.q_proj must be 4 or 8"):
        grace.pack(model)
    assert named(model, FakeQuantLinear) == names


def test_config_tells_what_was_done():
    model = models.qwen2()
    names = grace.quantize(model, bits=4, group_size=32)
    assert model.config.quantization_config == {
        "quant_method": "grace",
        "groups": [{"bits": 4, "group_size": 32, "scale_dtype": "bfloat16", "modules": names}],
    }
    grace.pack(model)
    assert model.config.quantization_config["quant_method"] == "compressed-tensors"


def test_overrides_by_regex_the_last_one_wins() -> None:
    model = models.llava()
    overrides = {
        "proj$": {"bits": 8},
        r"\.1\..*down_proj$": {"bits": 2, "group_size": -1, "scale_dtype": None},
        "k_proj": None,
        "lm_head": None,
    }
    names = grace.quantize(model, group_size=16, overrides=overrides)
    assert len(names) == 2 * 6
    for name in names:
        layer = model.get_submodule(name)
        changed = ".1." in name and name.endswith("down_proj")
        expected = (2, -1, None) if changed else (8, 16, torch.bfloat16)
        assert (layer.bits, layer.group_size, layer.scale_dtype) == expected, name
    assert type(model.get_submodule("model.language_model.layers.0.self_attn.k_proj")) is nn.Linear
    groups = model.config.quantization_config["groups"]
    assert sorted((g["bits"], len(g["modules"])) for g in groups) == [(2, 1), (8, 11)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lm_head": {"bits": 8}}, "overrides must match decoder linears of the model, got 'lm_h"),
        ({"nothing": None}, "overrides must match modules of the model, got 'nothing'"),
        ({"proj": None}, "overrides must leave linears to quantize"),
        ({"proj": {"bit": 4}}, "an override must have bits, group_size, .*, got 'bit'"),
        ({"q_proj": {"bits": 9}}, "bits must be 2 to 8, got 9"),
        ({"down_proj": {"group_size": 48}}, "group_size must divide in_features 128"),
    ],
)
def test_overrides_that_do_not_fit_change_nothing(overrides: dict, message: str) -> None:
    model = models.llava()
    with pytest.raises(ValueError, match=message):
        grace.quantize(model, group_size=16, overrides=overrides)
    assert not any(isinstance(m, FakeQuantLinear) for m in model.modules())
