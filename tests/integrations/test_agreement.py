"""The deployed model is the trained one: logits to rounding, answers over a drawn benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packed_models import export_tiny, packed_layers
from torch import Tensor

import grace
from grace.evaluation import mme, synthetic, tiny
from grace.evaluation.answer import Batch, answer, prepare

SOURCES: dict[str, Callable[[], Path]] = {"student": tiny.student_dir, "teacher": tiny.teacher_dir}
CASES = [("student", 4), ("teacher", 8)]


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """216 held-out questions of six kinds."""
    root = tmp_path_factory.mktemp("benchmark") / "drawn"
    synthetic.draw(root, images_per_subtask=18, seed=3)
    rows = mme.load(root)
    assert len(rows) == 216
    return prepare(tiny.make_processor(), rows, batch_size=72)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-w{case[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The fake-quantized model, and the directory that it was exported to."""
    name, bits = request.param
    out = tmp_path_factory.mktemp("exported") / "out"
    return export_tiny(out, bits, SOURCES[name]()), out


def load(directory: Path, dtype: torch.dtype, fuse: bool = False) -> Any:
    kind = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(directory, dtype=dtype).eval()
    if fuse:
        assert grace.nn.fuse(model)
    assert packed_layers(model) or fuse
    return model


@torch.no_grad()
def last_logits(model: Any, batches: list[Batch]) -> Tensor:
    """[216, V] in float64: of the token that begins each answer."""
    parts = []
    for batch in batches:
        inputs = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        }
        parts.append(model(**inputs, logits_to_keep=1).logits[:, -1].double())
    return torch.cat(parts)


def in_dtype(trained: Any, dtype: torch.dtype, directory: Path) -> Any:
    """The fake-quantized model with all but its quantized weights in ``dtype``.

    Its masters are the weights that are on the grid already: their codes are the same in ``dtype``.
    """
    model = load(directory, dtype).dequantize(dtype)
    for name, module in trained.named_modules():
        if isinstance(module, grace.nn.FakeQuantLinear):
            expected = module.quantized_weight().to(dtype)
            assert torch.equal(model.get_submodule(name).weight, expected)
    return model


def test_logits_in_float32(pair: Any, batches: list[Batch]):
    trained, directory = pair
    expected = last_logits(trained, batches)
    found = last_logits(load(directory, torch.float32), batches)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("fuse", [False, True])
def test_logits_in_bfloat16_are_no_further_off_than_the_rounding(
    fuse: bool, pair: Any, batches: list[Batch]
):
    """The truth is the trained model in float32; the measure, the same model run in bfloat16."""
    trained, directory = pair
    exact = last_logits(trained, batches)
    rounding = (last_logits(in_dtype(trained, torch.bfloat16, directory), batches) - exact).norm()
    found = last_logits(load(directory, torch.bfloat16, fuse), batches)
    assert 0 < (found - exact).norm() <= 1.2 * rounding


@pytest.mark.parametrize("fuse", [False, True])
def test_greedy_answers_agree(fuse: bool, pair: Any, batches: list[Batch]):
    trained, directory = pair
    options = {"max_new_tokens": 2, "progress": False}
    expected = answer(trained, tiny.make_processor(), batches, **options)
    found = answer(load(directory, torch.float32, fuse), tiny.make_processor(), batches, **options)
    same = sum(map(str.__eq__, expected, found))
    assert same >= 0.995 * len(expected)
    assert 0.3 < sum(said == "Yes" for said in expected) / len(expected) < 0.7


def test_a_model_of_other_codes_does_not_agree(pair: Any, batches: list[Batch]):
    """That the comparisons above can fail."""
    trained, directory = pair
    model = load(directory, torch.float32)
    for layer in packed_layers(model).values():
        layer.qweight.copy_(layer.qweight.roll(1))
    expected = last_logits(trained, batches)
    found = last_logits(model, batches)
    assert (found - expected).norm() > 0.1 * expected.norm()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement < 0.9
