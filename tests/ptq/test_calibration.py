"""What layers are given, and how data flows through them: of every family, with images."""

from __future__ import annotations

import copy

import families
import models
import pytest
import torch
from ptq_models import inputs, made
from torch import Tensor

import grace
from grace import quantization
from grace.ptq.calibration import Calibration
from grace.ptq.gptq import Hessian
from grace.ptq.structure import fold, groups, with_source


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_structure_is_found_by_running(kind: str) -> None:
    model = made(kind, num_key_value_heads=4)
    prefix, layers = quantization.decoder_layers(model)
    assert prefix.endswith("layers")
    with torch.no_grad():
        calibration = Calibration(model, layers, [families.batch(kind)])
        run = lambda: calibration.run(calibration.samples[0], 0)  # noqa: E731
        found = [with_source(layers[0], group, run) for group in groups(layers[0], run)]
    attention, mlp = "self_attn.", "mlp."
    assert [(group.names, group.source) for group in found] == [
        (tuple(attention + n for n in ("q_proj", "k_proj", "v_proj")), "input_layernorm"),
        ((attention + "o_proj",), attention + "v_proj"),
        ((mlp + "gate_proj", mlp + "up_proj"), "post_attention_layernorm"),
        ((mlp + "down_proj",), mlp + "up_proj"),
    ]
    assert [group.block for group in found] == [
        "self_attn",
        found[1].names[0],
        "mlp",
        "mlp.down_proj",
    ]


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "idefics3"])
def test_layers_run_alone_as_they_run_in_the_model(kind: str) -> None:
    """Masks, position embeddings and, in Qwen3-VL, what is added between layers are kept."""
    model = made(kind, num_hidden_layers=3)
    _, layers = quantization.decoder_layers(model)
    seen: list[Tensor] = []
    hook = layers[2].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(**inputs(kind))
        hook.remove()
        calibration = Calibration(model, layers, [families.batch(kind)])
        for number in range(2):
            calibration.advance(number)
        torch.testing.assert_close(calibration.run(calibration.samples[0], 2), seen[0])
    added = [more is not None for more in calibration.samples[0].added]
    assert added == [False, kind == "qwen3_vl", kind == "qwen3_vl"]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_folding_changes_nothing_before_quantization(kind: str) -> None:
    model = made(kind, num_key_value_heads=4)
    batch = inputs(kind)
    _, layers = quantization.decoder_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**batch).logits
        calibration = Calibration(model, layers, [batch])
        run = lambda: calibration.run(calibration.samples[0], 0)  # noqa: E731
        for group in groups(layers[0], run):
            source = with_source(layers[0], group, run).source
            assert source is not None
            linears = [layers[0].get_submodule(name) for name in group.names]
            scale = torch.rand(linears[0].in_features) + 0.5
            fold(layers[0].get_submodule(source), linears, scale)
        changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
        assert len(changed) >= 9
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_probe_leaves_the_layer_as_it_was() -> None:
    model = made("qwen3_vl", num_key_value_heads=4).bfloat16()
    _, layers = quantization.decoder_layers(model)
    before = copy.deepcopy(layers[0].state_dict())
    with torch.no_grad():
        calibration = Calibration(model, layers, [inputs("qwen3_vl")])
        run = lambda: calibration.run(calibration.samples[0], 0)  # noqa: E731
        sources = [with_source(layers[0], group, run).source for group in groups(layers[0], run)]
    assert sources[1] == "self_attn.v_proj"
    assert all(torch.equal(value, before[name]) for name, value in layers[0].state_dict().items())


def test_padding_and_labels_do_not_count() -> None:
    tokens = torch.randint(3, 80, (1, 20))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    mask = (padded != 0).long()
    mask[0, 5:] = 1
    found = []
    square = (mask[:, :, None] == mask[:, None, :])[:, None].tril()  # padding sees itself
    positions = (torch.arange(25) - 5).clamp(min=0)[None]
    for batch in (
        {"input_ids": tokens},
        {"input_ids": padded, "attention_mask": mask, "labels": padded},
        {
            "input_ids": padded,
            "attention_mask": square,
            "position_ids": positions,
            "valid_tokens": mask.bool(),
        },
    ):
        model = models.qwen2()
        _, layers = quantization.decoder_layers(model)
        with torch.no_grad():
            calibration = Calibration(model, layers, [batch])
            hessian = Hessian(64, "cpu")
            first = layers[1].self_attn.q_proj
            calibration.advance(0)
            calibration.run_to(first, 1, lambda sample, x, h=hessian: h.add(sample.rows(x)))
        found.append(hessian)
    assert [hessian.tokens for hessian in found] == [20, 20, 20]
    for hessian in found[1:]:
        torch.testing.assert_close(hessian.sum, found[0].sum, rtol=1e-4, atol=1e-4)


def test_inputs_that_are_not_finite_are_told_of() -> None:
    model = models.qwen2()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    batches = [{"input_ids": torch.tensor([[7, 8]])}, {"input_ids": torch.tensor([[7, 5]])}]
    with pytest.raises(ValueError, match="hidden states of batch 1 must be finite"):
        grace.ptq.quantize(model, "gptq", batches, group_size=32, progress=False)
