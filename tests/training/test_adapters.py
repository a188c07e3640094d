"""Hidden states, visual tokens and a step of training of each family, on models of a few layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from grace.quantization import pack
from grace.training import GraceConfig, GraceTrainer
from grace.training.adapters import FAMILIES, adapter_for
from grace.training.callbacks import read_metrics
from grace.training.step import model_inputs

KINDS = list(families.FAMILIES)
_VISION = {"idefics3": "vision_model", "smolvlm": "vision_model"} | dict.fromkeys(
    families.QWEN, "visual"
)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., GraceTrainer]:
    """Two steps on the family's batch; keyword arguments are options of GraceConfig."""

    def run(kind: str, student: nn.Module, teacher: nn.Module, **options: Any) -> GraceTrainer:
        defaults = {
            "output_dir": str(tmp_path),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "group_size": 16,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = GraceTrainer(
            student,
            GraceConfig(**{**defaults, **options}),
            teacher,
            train_dataset=[{"row": 0}, {"row": 1}],
            data_collator=lambda _: families.batch(kind),
        )
        trainer.train()
        return trainer

    return run


def test_every_family_is_tested() -> None:
    assert set(KINDS) == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_visual_tokens_and_hidden_states(kind: str) -> None:
    model = families.FAMILIES[kind]().eval()
    batch = model_inputs(families.batch(kind))
    adapter = adapter_for(model)
    visual = adapter.visual_tokens(batch)
    assert visual is not None
    assert visual.index.tolist() == families.positions(kind)
    assert visual.cu_seqlens.tolist() == [0, *accumulate(families.lengths(kind))]
    assert visual.cu_seqlens.dtype == torch.int32
    assert visual.images(min_tokens=4) == sum(n >= 4 for n in families.lengths(kind))
    with adapter.capture(-2) as states:
        output = model(**batch, output_hidden_states=True)
    assert torch.equal(states.last, output.hidden_states[-1])
    assert torch.equal(states.layer, output.hidden_states[-2])
    torch.testing.assert_close(states.last @ adapter.head.T, output.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_visual_positions_are_those_that_pixels_reach(kind: str) -> None:
    """The embedding of a visual token does not matter; that of any other does."""
    model = families.FAMILIES[kind]().eval()
    adapter, batch = adapter_for(model), model_inputs(families.batch(kind))
    entered = []
    hook = adapter.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(**batch)
    model(**{**batch, "pixel_values": batch["pixel_values"] * -2})
    hook.remove()
    moved = (entered[0] != entered[1]).any(-1).reshape(-1)
    assert moved.nonzero().squeeze(1).tolist() == families.positions(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_has_no_visual_tokens(kind: str) -> None:
    ids = torch.full((1, 4), 7)
    assert adapter_for(families.FAMILIES[kind]()).visual_tokens({"input_ids": ids}) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_frozen_and_the_projector_is_not(kind: str) -> None:
    model = families.FAMILIES[kind]()
    adapter = adapter_for(model)
    tower = getattr(model.model, _VISION.get(kind, "vision_tower"))
    assert adapter.vision_modules() == [tower]
    adapter.freeze_vision()
    projector = {id(p) for part in adapter.projector_modules() for p in part.parameters()}
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert projector
    assert frozen == {id(p) for p in tower.parameters()} - projector


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_runs_the_projector_where_ranks_need_it(kind: str) -> None:
    model = families.FAMILIES[kind]()
    adapter, inputs = adapter_for(model), {"input_ids": torch.full((1, 4), 7)}
    adapter.freeze_vision()
    projector = [p for part in adapter.projector_modules() for p in part.parameters()]
    with torch.no_grad():
        expected = model(**inputs).logits
    for needed in (False, True):
        with adapter.vision_always(inputs, needed):
            logits = model(**inputs).logits
        assert torch.equal(logits.detach(), expected)
        found = torch.autograd.grad(logits.sum(), projector, allow_unused=True)
        assert [grad is not None for grad in found] == [needed] * len(projector)
        assert all(grad is None or not grad.any() for grad in found)


@pytest.mark.parametrize(
    ("kind", "name"), [("llava", "LlamaDecoderLayer"), ("qwen3_vl", "Qwen3VLTextDecoderLayer")]
)
def test_the_class_that_fsdp_gathers_one_by_one(kind: str, name: str) -> None:
    assert adapter_for(families.FAMILIES[kind]()).layer_class() == name


def test_a_batch_with_images_gets_no_blank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = adapter_for(families.qwen2_vl()), model_inputs(families.batch("qwen2_vl"))
    monkeypatch.setattr(adapter, "blank_image", lambda _: pytest.fail("asked for a blank image"))
    with adapter.vision_always(batch, needed=True):
        assert not adapter.language_model._forward_pre_hooks
    with adapter.vision_always({"input_ids": batch["input_ids"]}, needed=False):
        assert not adapter.language_model._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_under_a_wider_deeper_teacher_with_a_padded_vocabulary(
    kind: str, train: Callable[..., GraceTrainer], tmp_path: Path
) -> None:
    student = families.FAMILIES[kind]()
    before = {name: value.clone() for name, value in student.named_parameters()}
    wide = {"vocab_size": 64, "num_hidden_layers": 5, "hidden_size": 48, "head_dim": 12}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    teacher = families.FAMILIES[kind](
        **wide, **({"rope_parameters": rope} if kind in families.QWEN else {})
    )
    trainer = train(kind, student, teacher, gradient_checkpointing=True)
    assert len(trainer.quantized) == 4 * 7
    assert all("vision" not in name and "visual" not in name for name in trainer.quantized)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert second["loss"] < first["loss"]
    assert first["rcka"] > 0
    assert first["gdkd"] > 0
    assert second["dropped_terms"] == 0
    frozen = {id(p) for p in student.parameters() if not p.requires_grad}
    after = dict(student.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value) == (id(after[name]) in frozen), name


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_from_a_directory_to_a_packed_model(
    kind: str, train: Callable[..., GraceTrainer], tmp_path: Path
) -> None:
    families.FAMILIES[kind]().save_pretrained(tmp_path / "plain")
    load = AutoModelForImageTextToText.from_pretrained
    dtypes = (torch.float32, torch.bfloat16)
    student, teacher = (load(tmp_path / "plain", dtype=dtype) for dtype in dtypes)
    trainer = train(kind, student, teacher, max_steps=1, bf16=True, overrides={"o_proj$": None})
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    step = read_metrics(tmp_path / "metrics.jsonl")[0]
    # Student and teacher begin as one model, but for four bits and what bf16 rounds.
    assert step["dropped_terms"] == 0
    assert 0 < step["gdkd"] < 0.05
    assert 0 < step["rcka"] < 0.05
    trainer.save_model(str(tmp_path / "final"))
    again = load(tmp_path / "final", dtype=torch.float32).eval()
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    inputs = model_inputs(families.batch(kind))
    with torch.no_grad():
        expected = again(**inputs).logits
        assert len(pack(again)) == 4 * 6
        packed = again(**inputs).logits
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_the_layer_is_read_behind_what_deepstack_adds() -> None:
    model, batch = families.qwen3_vl().eval(), model_inputs(families.batch("qwen3_vl"))
    seen = []
    hook = model.model.language_model.layers[2].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with adapter_for(model).capture(-3) as states:
        model(**batch)
    hook.remove()
    assert torch.equal(states.layer, seen[0])


def test_hooks_go_when_the_forward_fails(make_student: Any) -> None:
    model = make_student()
    adapter = adapter_for(model)
    with pytest.raises(RuntimeError, match="stop"), adapter.capture(-2):
        raise RuntimeError("stop")
    assert not adapter.language_model._forward_hooks
    assert not adapter.layers[-1]._forward_pre_hooks


@pytest.mark.parametrize(("kind", "other"), [("qwen2_vl", "qwen2_5_vl"), ("smolvlm", "idefics3")])
def test_families_that_count_alike_may_be_mixed(
    kind: str, other: str, train: Callable[..., GraceTrainer], tmp_path: Path
) -> None:
    train(kind, families.FAMILIES[kind](), families.FAMILIES[other]())
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["rcka"] > 0


@pytest.mark.parametrize("omega", [1.0, 0.0])
def test_a_teacher_with_other_visual_tokens_is_refused(
    train: Callable[..., GraceTrainer], omega: float
) -> None:
    message = r"visual tokens, 10 tokens in 3 images, got 10 tokens in 2 images; its family"
    with pytest.raises(ValueError, match=message):
        train("qwen2_vl", families.qwen2_vl(), families.smolvlm(), omega=omega)


def test_a_teacher_with_another_image_token_is_refused(train: Callable[..., GraceTrainer]) -> None:
    teacher = families.llava()
    teacher.config.image_token_id = 49
    with pytest.raises(ValueError, match="48 tokens in 3 images, got 0 tokens"):
        train("llava", families.llava(), teacher)


def test_an_unknown_family_is_told_what_to_do() -> None:
    message = r"\(llava, .*, smolvlm\), got 'Linear'; another needs a subclass of .*Adapter that"
    with pytest.raises(ValueError, match=message):
        adapter_for(nn.Linear(2, 2))


def test_a_tower_of_any_size_is_refused() -> None:
    model = families.llava()
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match=r"one number of tokens an image .*, got 'pixtral'"):
        adapter_for(model)
