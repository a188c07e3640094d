"""The teacher at 8 bits, on a stream of its own, in shards: what it says stays what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TEACHER, make_model

from grace.nn import PackedLinear
from grace.quantization import quantize
from grace.training import GraceConfig
from grace.training.callbacks import read_metrics
from grace.training.step import Teacher, model_inputs, supervised
from grace.training.teacher_placement import TeacherStream, place_teacher


def batch_of(trainer: Any, dataset: Any) -> dict[str, Any]:
    return trainer.data_collator([dataset[item] for item in range(4)])


def rows_of(trainer: Any, teacher: Teacher, batch: dict[str, Any]) -> Any:
    index, _ = supervised(batch["labels"])
    return teacher(model_inputs(batch), index, trainer.adapter.visual_tokens(batch))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_teacher_is_the_quantized_teacher(
    make_trainer: Callable, dataset: Any, bits: int
) -> None:
    trainer = make_trainer(teacher_bits=bits, teacher_group_size=16)
    packed = [m for m in trainer.teacher.model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 3 * 7
    assert {layer.bits for layer in packed} == {bits}
    same = make_model(TEACHER, seed=1)
    quantize(same, bits=bits, group_size=16)
    batch = batch_of(trainer, dataset)
    said = rows_of(trainer, trainer.teacher, batch)
    expected = rows_of(trainer, Teacher(same, trainer.args), batch)
    torch.testing.assert_close(said.last, expected.last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.layer, expected.layer, rtol=1e-4, atol=1e-5)


def test_eight_bits_hardly_change_a_run(make_trainer: Callable, tmp_path: Path) -> None:
    for name, bits in (("whole", None), ("packed", 8)):
        out = str(tmp_path / name)
        make_trainer(teacher_bits=bits, teacher_group_size=16, output_dir=out).train()
    whole, packed = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("whole", "packed"))
    for a, b in zip(whole, packed, strict=True):
        assert b["gdkd"] == pytest.approx(a["gdkd"], rel=0.02)
        assert b["gdkd"] != a["gdkd"]


def test_the_teacher_keeps_no_graph(make_trainer: Callable, dataset: Any) -> None:
    trainer = make_trainer()
    modes = []
    trainer.teacher.model.register_forward_hook(
        lambda *_: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    rows = rows_of(trainer, trainer.teacher, batch_of(trainer, dataset))
    assert modes == [(True, False)]
    assert not rows.last.requires_grad
    assert not rows.last.is_inference()  # losses save it for their backward
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_bits": 3}, "teacher_bits must be 4, 8 or None, got 3"),
        ({"teacher_group_size": 0}, "teacher_group_size must be > 0 or -1, got 0"),
        ({"teacher_bits": 8, "teacher_fsdp": True}, "teacher_fsdp must be False with teacher_bits"),
        ({"chunk_size": 0}, "chunk_size must be > 0, got 0"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraceConfig(output_dir=str(tmp_path), **options)


def test_what_does_not_fit_the_teacher(make_trainer: Callable) -> None:
    with pytest.raises(ValueError, match="group_size must divide in_features 32"):
        make_trainer(teacher_bits=8, teacher_group_size=48)
    with pytest.raises(ValueError, match="teacher_fsdp must be False on one rank"):
        make_trainer(teacher_fsdp=True)


def test_chunks_change_nothing_but_memory(make_trainer: Callable, tmp_path: Path) -> None:
    for name, size in (("whole", None), ("chunks", 3)):
        make_trainer(chunk_size=size, output_dir=str(tmp_path / name)).train()
    whole, chunks = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("whole", "chunks"))
    for a, b in zip(whole, chunks, strict=True):
        assert b["gdkd"] == pytest.approx(a["gdkd"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_without_a_gpu_there_is_no_stream() -> None:
    assert TeacherStream(torch.device("cpu"), on=True).stream is None


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_of_its_own_changes_nothing(
    make_trainer: Callable, tmp_path: Path, accumulation: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    made = []
    for name, on in (("one", False), ("two", True)):
        trainer = make_trainer(
            teacher_stream=on,
            max_steps=3,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            use_cpu=False,
            output_dir=str(tmp_path / name),
        )
        assert (trainer._stream.stream is not None) == on
        trainer.train()
        made.append(trainer.model.state_dict())
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for key in ("ce", "gdkd", "rcka"):
        assert rows[0][0][key] == pytest.approx(rows[1][0][key], rel=1e-5), key
    for name, value in made[0].items():  # a GPU adds up embeddings' gradients in any order
        torch.testing.assert_close(made[1][name], value, rtol=5e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_an_eight_bit_teacher_runs_on_a_gpu(make_trainer: Callable, dataset: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    trainer = make_trainer(use_cpu=False, bf16=True)
    teacher = make_model(TEACHER, seed=1).to(torch.bfloat16)
    whole = Teacher(make_model(TEACHER, seed=1).to("cuda", torch.bfloat16), trainer.args)
    trainer.args.teacher_bits, trainer.args.teacher_group_size = 8, 16
    packed = place_teacher(teacher, trainer.args)
    batch = {name: value.to("cuda") for name, value in batch_of(trainer, dataset).items()}
    said, expected = (rows_of(trainer, teacher, batch) for teacher in (packed, whole))
    error = (said.last - expected.last).float().norm() / expected.last.float().norm()
    assert error < 0.05
