"""Packed samples: planned, joined, and the same as one by one for model, loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import STUDENT, TEACHER, make_model
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from grace.training import Collator, GraceConfig, GraceTrainer
from grace.training.adapters import adapter_for
from grace.training.collator import PackedCollator
from grace.training.sequence_packing import PackedDataset, Positions, plan_packs

IMAGE, START = 50, 52
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 51, "vision_start_token_id": START}
PAD = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=0))
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


def _model(kind: str, seed: int = 0) -> nn.Module:
    if kind == "llava":
        return make_model(STUDENT if seed == 0 else TEACHER, seed)
    torch.manual_seed(seed)
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "patch_size": 4}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        config = Qwen2VLConfig(vision_config=vision, text_config=TEXT, **TOKENS)
        return Qwen2VLForConditionalGeneration(config)
    vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1], "window_size": 16}
        config = Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT, **TOKENS)
        return Qwen2_5_VLForConditionalGeneration(config)
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = Qwen3VLConfig(vision_config=vision, text_config={**TEXT, "head_dim": 8}, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


def _sample(kind: str, row: int, length: int, grids: list[list[int]]) -> dict[str, Tensor]:
    """A sample of `length` tokens with an image a grid; the last third is supervised."""
    random = torch.Generator().manual_seed(row)
    image = 4 if kind == "llava" else IMAGE
    ids = torch.randint(5, 49, (length,), generator=random)
    place = 1
    for grid in grids:
        count = 16 if kind == "llava" else grid[1] * grid[2] // 4
        ids[place] = START if kind != "llava" else 5
        ids[place + 1 : place + 1 + count] = image
        place += count + 2
    labels = torch.where(torch.arange(length) >= length - length // 3, ids, -100)
    sample = {"input_ids": ids, "labels": labels, "row_ids": torch.tensor(row)}
    sample["attention_mask"] = torch.ones_like(ids)
    if kind == "llava":
        pixels = {"pixel_values": torch.randn(len(grids), 3, 32, 32, generator=random)}
        return sample | (pixels if grids else {})
    sample["mm_token_type_ids"] = (ids == IMAGE).int()
    if grids:
        sample["image_grid_thw"] = torch.tensor(grids)
        patches = int(sample["image_grid_thw"].prod(-1).sum())
        sample["pixel_values"] = torch.randn(patches, 3 * 2 * 4 * 4, generator=random)
    return sample


def _samples(kind: str) -> list[dict[str, Tensor]]:
    """Two images, text alone, one image, and a sample of two tokens."""
    tall, wide = [1, 8, 4], [1, 4, 8]
    shapes = [(44, [tall, wide]), (7, []), (23, [[1, 4, 4]]), (2, [])]
    return [_sample(kind, row, *shape) for row, shape in enumerate(shapes)]


def _packed(model: nn.Module, packs: list, **options: Any) -> dict[str, Tensor]:
    return PackedCollator(PAD, model.config, **options)(packs)


@torch.no_grad()
def _hidden(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    names = ("labels", "row_ids")
    inputs = {name: value for name, value in batch.items() if name not in names}
    with adapter_for(model).capture(-2) as states:
        model(**inputs, use_cache=False)
    return states.last, states.layer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_the_samples_alone(kind: str, attention: str) -> None:
    model = _model(kind).eval()
    model.set_attn_implementation(attention)
    samples = _samples(kind)
    alone = [_hidden(model, Collator(PAD)([sample])) for sample in samples]
    batch = _packed(model, [samples])
    assert batch["input_ids"].shape == (1, sum(len(sample["input_ids"]) for sample in samples))
    assert "attention_mask" not in batch
    for packed, expected in zip(_hidden(model, batch), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(packed, torch.cat(expected, 1))
    adapter = adapter_for(model)
    visual = adapter.visual_tokens(batch)
    assert visual is not None
    assert visual.cu_seqlens.tolist() == ([0, 16, 32, 48] if kind == "llava" else [0, 8, 16, 20])
    seen = torch.cat([adapter.visual_tokens(sample).index for sample in (samples[0], samples[2])])
    assert seen.numel() == visual.index.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_without_restarting_positions_samples_would_see_each_other(kind: str) -> None:
    """What the tests here would miss if the model took no notice of positions."""
    model, samples = _model(kind).eval(), _samples(kind)
    batch = _packed(model, [samples])
    last, _ = _hidden(model, batch)
    text = batch["position_ids"][:1] if batch["position_ids"].dim() == 3 else batch["position_ids"]
    text.copy_(torch.arange(text.shape[-1]))
    assert not torch.allclose(_hidden(model, batch)[0][:, 44:], last[:, 44:], atol=1e-4)


def _trainer(kind: str, tmp_path: Path, **options: Any) -> GraceTrainer:
    config = GraceConfig(
        output_dir=str(tmp_path), group_size=16, use_cpu=True, disable_tqdm=True, **options
    )
    return GraceTrainer(_model(kind), config, _model(kind, seed=1), train_dataset=[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packs", [[4], [2, 2], [1, 3]])
def test_loss_and_gradients_are_those_of_a_padded_batch(
    kind: str, packs: list[int], tmp_path: Path
) -> None:
    trainer, samples = _trainer(kind, tmp_path), _samples(kind)
    model = trainer.model
    rows, rest = [], list(samples)
    for count in packs:
        rows.append(rest[:count])
        rest = rest[count:]
    padded = trainer.compute_loss(model, Collator(PAD)(samples))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(padded, trained)
    for flatten in (False, True):
        batch = _packed(model, rows, flatten=flatten)
        assert len(batch["input_ids"]) == (1 if flatten else len(rows))
        assert batch["row_ids"].tolist() == [0, 1, 2, 3]
        loss = trainer.compute_loss(model, batch)
        torch.testing.assert_close(loss, padded)
        for packed, one in zip(torch.autograd.grad(loss, trained), expected, strict=True):
            torch.testing.assert_close(packed, one, rtol=2e-3, atol=2e-6)


def test_the_first_token_of_a_sample_is_no_target() -> None:
    samples = _samples("llava")
    samples[1]["labels"] = samples[1]["input_ids"].clone()
    batch = _packed(_model("llava"), [samples[:2]])
    assert batch["labels"][0, 44] == -100
    assert torch.equal(batch["labels"][0, 45:], samples[1]["input_ids"][1:])
    assert batch["position_ids"].tolist() == [[*range(44), *range(7)]]


def test_padding_is_a_sample_of_its_own() -> None:
    samples = _samples("qwen3_vl")
    batch = _packed(_model("qwen3_vl"), [samples[:1], samples[1:]])
    assert batch["position_ids"].shape == (4, 2, 44)
    assert batch["position_ids"][0, 1].tolist() == [*range(7), *range(23), 0, 1, *range(12)]
    assert batch["labels"][1, 32:].eq(-100).all()


def test_positions_of_a_model_are_its_own() -> None:
    model = _model("qwen2_vl")
    sample = _samples("qwen2_vl")[0]
    expected, _ = model.model.get_rope_index(
        sample["input_ids"][None],
        mm_token_type_ids=sample["mm_token_type_ids"][None],
        image_grid_thw=sample["image_grid_thw"],
    )
    positions = Positions(model.config)(sample)
    assert torch.equal(positions[1:], expected[:, 0])
    assert positions[0].tolist() == list(range(44))
    assert not list(Positions(model.config).model.parameters())


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=300),
    capacity=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_a_plan_holds_every_item_once(lengths: list[int], capacity: int, seed: int) -> None:
    sizes = np.array(lengths)
    packs = plan_packs(sizes, capacity, seed)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    assert all(sizes[pack].sum() <= capacity or len(pack) == 1 for pack in packs)
    again = plan_packs(sizes, capacity, seed)
    assert all(np.array_equal(one, two) for one, two in zip(packs, again, strict=True))


def test_packs_are_full() -> None:
    lengths = np.random.default_rng(0).integers(50, 900, 5000)
    packs = plan_packs(lengths, 2048, seed=0)
    assert lengths.sum() / (2048 * len(packs)) > 0.97
    other = plan_packs(lengths, 2048, seed=1)
    assert not np.array_equal(np.concatenate(packs), np.concatenate(other))
    with pytest.raises(ValueError, match="plan_packs: capacity must be >= 1, got 0"):
        plan_packs(lengths, 0, seed=0)


def test_a_packed_data_set_trains(
    dataset: Any, processor: Any, tmp_path: Path, make_student: Callable[[], nn.Module]
) -> None:
    packed = PackedDataset(dataset, capacity=100, seed=0)
    exact = np.array([dataset[item]["input_ids"].numel() for item in range(len(dataset))])
    assert np.abs(dataset.lengths - exact).max() <= 2
    assert len(packed) < len(dataset) / 2
    rows = [sample["row_ids"].item() for pack in range(len(packed)) for sample in packed[pack]]
    assert sorted(rows) == list(range(len(dataset)))
    student = make_student()
    config = GraceConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        group_size=16,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = GraceTrainer(
        student,
        config,
        make_model(TEACHER, seed=1),
        train_dataset=packed,
        data_collator=PackedCollator(processor, student.config),
    )
    assert trainer.train().training_loss > 0
