"""Hidden states and visual tokens of each family, on models of a few layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from grace.training import GraceConfig, GraceTrainer
from grace.training.adapters import adapter_for
from grace.training.callbacks import read_metrics

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
IMAGE, VIDEO, START = 50, 51, 52
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}


def _qwen(kind: str, **options: int) -> nn.Module:
    torch.manual_seed(0)
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "patch_size": 4}
    text = {**TEXT, "rope_parameters": ROPE, **options}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        config = Qwen2VLConfig(vision_config=vision, text_config=text, **TOKENS)
        return Qwen2VLForConditionalGeneration(config)
    if kind == "qwen2_5_vl":
        vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
        vision |= {"fullatt_block_indexes": [1], "window_size": 16}
        config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **TOKENS)
        return Qwen2_5_VLForConditionalGeneration(config)
    vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = Qwen3VLConfig(vision_config=vision, text_config={**text, "head_dim": 8}, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


def _batch(kind: str) -> dict[str, Tensor]:
    """Two rows: images of 4 and 2 visual tokens, then one of 4."""
    ids = torch.full((2, 14), 7)
    for row, start, count in ((0, 1, 4), (0, 7, 2), (1, 3, 4)):
        ids[row, start - 1] = START
        ids[row, start : start + count] = IMAGE
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4]])
    patches = int(grid.prod(-1).sum())
    torch.manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen(kind: str) -> None:
    model, batch = _qwen(kind).eval(), _batch(kind)
    adapter = adapter_for(model)
    visual = adapter.visual_tokens(batch)
    assert visual is not None
    assert visual.cu_seqlens.tolist() == [0, 4, 6, 10]
    assert visual.index.tolist() == [1, 2, 3, 4, 7, 8, 17, 18, 19, 20]
    assert visual.images(min_tokens=4) == 2
    with adapter.capture(-2) as states:
        output = model(**batch, output_hidden_states=True)
    assert torch.equal(states.last, output.hidden_states[-1])
    assert torch.equal(states.layer, output.hidden_states[-2])
    torch.testing.assert_close(states.last @ adapter.head.T, output.logits)
    assert adapter.vision_modules() == [model.model.visual]


def test_the_layer_is_read_behind_what_deepstack_adds() -> None:
    model, batch = _qwen("qwen3_vl").eval(), _batch("qwen3_vl")
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


def test_text_alone_has_no_visual_tokens(make_student: Any) -> None:
    ids = torch.full((1, 4), 7)
    assert adapter_for(make_student()).visual_tokens({"input_ids": ids}) is None
    assert adapter_for(_qwen("qwen2_vl")).visual_tokens({"input_ids": ids}) is None


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_step_under_a_teacher_with_a_padded_vocabulary(kind: str, tmp_path: Path) -> None:
    student, teacher = _qwen(kind), _qwen(kind, vocab_size=64, num_hidden_layers=5)
    labels = torch.full((2, 14), -100)
    labels[:, 11:] = torch.tensor([[8, 9, 59], [3, 2, -100]])
    config = GraceConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        group_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GraceTrainer(
        student,
        config,
        teacher,
        train_dataset=[{"row": 0}, {"row": 1}],
        data_collator=lambda _: {**_batch(kind), "labels": labels},
    )
    assert all(".visual." not in name for name in trainer.quantized)
    assert len(trainer.quantized) == 4 * 7
    trainer.train()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert second["loss"] < first["loss"]
    assert first["rcka"] > 0
    assert first["gdkd"] > 0
    assert second["dropped_terms"] == 0


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_blank_image_changes_nothing_and_leaves_no_parameter_out(
    kind: str, make_student: Any
) -> None:
    model = (make_student() if kind == "llava" else _qwen(kind)).eval()
    adapter, ids = adapter_for(model), torch.full((2, 6), 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    without = model(**batch).logits
    with adapter.vision_always(batch, needed=True):
        logits = model(**batch).logits
    torch.testing.assert_close(logits, without, rtol=0, atol=0)
    logits.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    # CLIP's norm of the pooled token serves nobody but CLIP.
    assert {n for n, g in grads.items() if g is None and "post_layernorm" not in n} == set()
    assert not any(grads[n].any() for n in grads if "visual" in n or "projector" in n)
    assert not adapter.language_model._forward_pre_hooks


def test_a_batch_with_images_gets_no_blank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = adapter_for(_qwen("qwen2_vl")), _batch("qwen2_vl")
    monkeypatch.setattr(adapter, "blank_image", lambda _: pytest.fail("asked for a blank image"))
    with adapter.vision_always(batch, needed=True):
        assert not adapter.language_model._forward_pre_hooks
    with adapter.vision_always({"input_ids": batch["input_ids"]}, needed=False):
        assert not adapter.language_model._forward_pre_hooks


def test_the_class_that_fsdp_gathers_one_by_one(make_student: Any) -> None:
    assert adapter_for(make_student()).layer_class() == "LlamaDecoderLayer"
    assert adapter_for(_qwen("qwen3_vl")).layer_class() == "Qwen3VLTextDecoderLayer"
