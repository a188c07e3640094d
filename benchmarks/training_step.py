"""What a step of distillation is measured on: a student and a teacher with random weights, a batch,
and the authors' step put together from their formulas in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import bench_cka, bench_fake_quant, distillation
from benchmarks.models import config_of
from grace.nn import FakeQuantLinear
from grace.training.adapters import adapter_for

IGNORE = -100
GROUP = bench_fake_quant.GROUP


@dataclass(frozen=True)
class Shape:
    """Of a batch: rows of `packed` segments, each `tokens` long, `visual` of them of one image and
    the last `supervised` with labels."""

    rows: int
    packed: int
    tokens: int
    visual: int
    supervised: int

    @property
    def segments(self) -> int:
        """Segments of the batch, and images."""
        return self.rows * self.packed


def build(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of random weights, made on the device, checkpointing, attention by sdpa."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config_of(name), dtype=dtype, attn_implementation="sdpa"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter_for(model).freeze_vision()
    return model


def with_own_layers(model: nn.Module) -> nn.Module:
    """The same Parameters in modules of their own, which may be replaced."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class EagerLinear(nn.Module):
    """A linear layer through fake quantization as training libraries write it."""

    def __init__(self, layer: FakeQuantLinear) -> None:
        super().__init__()
        self.weight, self.log_scale, self.bias = layer.weight, layer.log_scale, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        weight = bench_fake_quant.eager(self.weight, self.log_scale)
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        return F.linear(x, weight, self.bias)


def replace_layers(model: nn.Module, quantized: nn.Module) -> None:
    """Puts an `EagerLinear` of the same tensors wherever `quantized` has a `FakeQuantLinear`."""
    for name, layer in quantized.named_modules():
        if isinstance(layer, FakeQuantLinear):
            model.set_submodule(name, EagerLinear(layer))


def make_batch(config: Any, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict:
    """Random text and pixels; images of Qwen are squares, segments have positions of their own."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (shape.segments, shape.tokens), generator=random)
    ids[:, 1 : 1 + shape.visual] = config.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -shape.supervised :] = ids[:, -shape.supervised :]
    width = shape.packed * shape.tokens
    batch = {"input_ids": ids.view(-1, width), "labels": labels.view(-1, width)}
    if hasattr(config, "video_token_id"):
        batch |= _grids(config, shape, batch["input_ids"])
    else:
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(shape.segments, 3, size, size, generator=random)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _grids(config: Any, shape: Shape, ids: Tensor) -> dict[str, Tensor]:
    vision = config.vision_config
    side = int(shape.visual**0.5) * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "pixel_values": torch.randn(shape.segments * side * side, values),
        "image_grid_thw": torch.tensor([[1, side, side]] * shape.segments),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    if shape.packed > 1:  # one row for text, which tells segments apart, and three of the image
        positions = torch.arange(shape.tokens).repeat(shape.packed)
        inputs["position_ids"] = positions.expand(4, shape.rows, -1).contiguous()
    return inputs


class Authors:
    """Their step in plain PyTorch: both heads on all tokens, all hidden states kept.

    Args:
        student: with `EagerLinear` layers.
        teacher: frozen.
        batch: as `make_batch` makes it.
        shape: of the batch.
        autocast: the context of the student's forward.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batch: Mapping[str, Tensor],
        shape: Shape,
        autocast: AbstractContextManager[Any],
    ) -> None:
        self.student, self.teacher, self.autocast = student, teacher, autocast
        self.inputs = {name: value for name, value in batch.items() if name != "labels"}
        self.lengths = [shape.visual] * shape.segments
        next_labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        self.valid = (next_labels != IGNORE).nonzero().squeeze(1)
        self.labels, self.targets = next_labels, next_labels[self.valid]
        visual = batch["input_ids"].flatten() == student.config.image_token_id
        self.visual = visual.nonzero().squeeze(1)

    def loss(self) -> Tensor:
        """Cross-entropy + gated DKD + RCKA."""
        with torch.no_grad():
            teacher, taught = self._run(self.teacher)
        with self.autocast:
            student, learned = self._run(self.student)
        cross_entropy = F.cross_entropy(student.float(), self.labels)
        rows = (logits.index_select(0, self.valid) for logits in (student, teacher))
        distilled = distillation.eager(*rows, self.targets)
        images = (hidden.index_select(0, self.visual) for hidden in (learned, taught))
        aligned = 1 - bench_cka.each(bench_cka.one_image, self.lengths)(*images)
        return cross_entropy + distilled + aligned.mean()

    def _run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of the layer before the last, a row a token."""
        out = model(**self.inputs, use_cache=False, output_hidden_states=True)
        return out.logits.flatten(0, 1), out.hidden_states[-2].flatten(0, 1)
