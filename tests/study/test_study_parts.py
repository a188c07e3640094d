"""Arms, statistics and the cached teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grace.evaluation.drawn.models import make_model
from grace.evaluation.tiny import Size
from grace.study import questions, training, worker
from grace.study.arms import Arm, quickstart_arms
from grace.study.config import SCALES, StudyConfig
from grace.study.data import PackedQuestions, cache_teacher, draw
from grace.study.models import compiled_layers, load, model_dir, processor_of
from grace.study.options import from_dict
from grace.study.report import read_study
from grace.study.run import run_study
from grace.study.statistics import pair_scores, paired_difference, subtask_errors, total_error
from grace.study.task import Task, questions_of, training_data
from grace.training import GraceConfig
from grace.training.adapters import adapter_for
from grace.training.step import Teacher, model_inputs, plan


def _load(config: StudyConfig, which: str) -> Any:
    return load(model_dir(config, Path(), which))


def _processor(config: StudyConfig) -> Any:
    return processor_of(model_dir(config, Path(), "student"))


def test_arms_that_are_compared_differ_in_nothing_else() -> None:
    by_name = {arm.name: arm for arm in quickstart_arms()}
    assert by_name["grace-2"].training_options() == {"bits": 2}
    assert by_name["control"].training_options()["quantization"] is False
    assert not by_name["rtn-4"].trained
    assert by_name["qat-4"].training_options().keys() >= {"distillation", "omega"}
    with pytest.raises(ValueError, match="method must be one of"):
        Arm("zero-shot", 4)
    with pytest.raises(ValueError, match="rtn must not be at 32 bits"):
        Arm("rtn")


def test_the_fingerprint_is_of_what_changes_results() -> None:
    config = SCALES["default"]
    assert replace(config, seeds=(0, 1)).fingerprint() == config.fingerprint()
    assert replace(config, steps=7).fingerprint() != config.fingerprint()
    tuned = replace(config, tuned={"grace": {"tau": 3.0}, "grace-2": {"tau": 4.0}})
    assert from_dict(tuned.as_dict()) == tuned
    assert hash(from_dict(tuned.as_dict())) == hash(tuned)
    assert tuned.options_of("grace", "grace-2") == {"tau": 4.0}
    assert tuned.options_of("grace", "grace-4") == {"tau": 3.0}
    assert tuned.options_of("qat", "qat-4") == {}


def test_standard_errors_are_those_of_means_over_pairs_of_images() -> None:
    right = "2210012222"
    points = np.array([{"0": 0, "1": 50, "2": 200}[digit] for digit in right])
    pairs = points.reshape(-1, 2).mean(1)
    np.testing.assert_allclose(pair_scores(right), pairs)
    error = pairs.std(ddof=1) / np.sqrt(5)
    assert subtask_errors([{"count": right}])["count"] == pytest.approx(error)
    both = {"count": right, "color": right}
    assert total_error([both]) == pytest.approx(np.sqrt(2) * error)
    assert paired_difference([both], [both]) == (0.0, 0.0)
    other = {"count": right, "color": "0" * 10}
    assert paired_difference([both], [other]) == pytest.approx((points.mean(), error))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, models: Path) -> tuple:
    config = replace(SCALES["tiny"], models=str(models), questions_per_image=5)
    root = tmp_path_factory.mktemp("drawn") / "data"
    draw(root, config)
    return config, root


def test_cached_teacher_rows_are_the_teacher_s_own(drawn: tuple, tmp_path: Path) -> None:
    config, root = drawn
    options = GraceConfig(output_dir=str(tmp_path), use_cpu=True)
    model = _load(config, "teacher")
    plain = PackedQuestions(root / "train", _processor(config))
    cache_teacher(model, plain, tmp_path / "teacher.safetensors", options, batch_images=5)
    cached = PackedQuestions(
        root / "train",
        _processor(config),
        tmp_path / "teacher.safetensors",
    )
    student = adapter_for(_load(config, "student"))
    teacher = Teacher(model, options)
    for chosen in ([3, 0, 7], [15, 2]):
        fresh, brought = (
            plan([data.collate([data[i] for i in chosen])], student, teacher, options, lambda x: x)
            for data in (plain, cached)
        )
        for a, b in zip(fresh, brought, strict=True):
            torch.testing.assert_close(a.teacher.last, b.teacher.last, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.teacher.layer, b.teacher.layer, rtol=1e-4, atol=1e-4)
            assert torch.equal(a.index, b.index)


def test_rows_of_another_teacher_are_refused(drawn: tuple, tmp_path: Path) -> None:
    config, root = drawn
    options = GraceConfig(output_dir=str(tmp_path), use_cpu=True)
    data = PackedQuestions(root / "train", _processor(config))
    batch = {**data.collate([data[0]]), "teacher_last": torch.zeros(1, 80)}
    batch["teacher_layer"] = torch.zeros(16, 80)
    student = adapter_for(_load(config, "student"))
    with pytest.raises(ValueError, match="teacher_last must have a row for each of"):
        plan([batch], student, Teacher(_load(config, "teacher"), options), options, lambda x: x)


def test_packed_batches_hold_every_question(drawn: tuple) -> None:
    config, root = drawn
    data = PackedQuestions(root / "train", _processor(config))
    batch = data.collate([data[0], data[9]])
    assert len(data) == 16
    blocks = [(position == 18).sum() for position in batch["position_ids"]]
    assert blocks == [5, 5]
    output = _load(config, "student")(**model_inputs(batch))
    assert output.logits.isfinite().all()


def test_a_teacher_that_is_missing_is_told_of_first(tmp_path: Path) -> None:
    config = replace(SCALES["tiny"], models=str(tmp_path / "absent"))
    with pytest.raises(OSError, match="must be a directory, got nothing"):
        run_study(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "report needs a study.json"),
        ("{", ValueError, "must be JSON"),
        ("{}", ValueError, "must be a grace-study of version 1"),
    ],
)
def test_files_that_are_no_study(
    tmp_path: Path, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / "study.json").write_text(text)
    with pytest.raises(error, match=message):
        read_study(tmp_path)


def test_compiled_layers_compute_and_are_kept_the_same() -> None:
    size = Size(width=16, inner=32, layers=2, heads=2, vision_width=16, vision_layers=2)
    losses = []
    for compiled in (False, True):
        model = make_model(size, 0, 28)
        names = list(model.state_dict())
        text = torch.randint(8, 90, (2, 9), generator=torch.Generator().manual_seed(0))
        image = torch.full((2, 4), model.config.image_token_index)
        pixels = torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28)
        ids = torch.cat([image, text], 1)
        # The graphs alone: what inductor makes of them is for GPUs.
        with compiled_layers(model, None, enabled=compiled, backend="aot_eager"):
            layers = model.model.language_model.layers
            assert all((layer._compiled_call_impl is not None) == compiled for layer in layers)
            loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
            loss.backward()
        assert all(layer._compiled_call_impl is None for layer in layers)
        grad = layers[0].mlp.up_proj.weight.grad
        losses.append((loss.item(), grad))
        assert list(model.state_dict()) == names
    (plain, grads), (fast, fast_grads) = losses
    assert fast == pytest.approx(plain, rel=1e-6)
    assert torch.allclose(fast_grads, grads, rtol=1e-4, atol=1e-7)


def test_what_was_trained_in_bf16_is_scored_as_its_weights_are(
    done: Path, config: StudyConfig, tmp_path: Path
) -> None:
    task = Task(Arm("control"), 0, config, done)
    model = load(task.model_dir("student"))
    options = worker.training_config(task, bf16=True, output_dir=str(tmp_path))
    training.train(model, options, training_data(task), task.processor)
    inputs = questions.on_device(questions_of(task).batches[0], model)
    fresh = load(task.model_dir("student"))
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
