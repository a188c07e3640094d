"""The order of an epoch: by seed and epoch alone, shared by ranks, grouped, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, Dataset

from grace.training.sampler import (
    EpochSampler,
    EpochSetter,
    check_data_state,
    data_state,
    epoch_sampler,
)

LENGTHS = np.random.default_rng(3).integers(10, 1000, 1003)


@given(
    size=st.integers(1, 300), step=st.integers(1, 40), seed=st.integers(0, 3), grouped=st.booleans()
)
def test_an_epoch_is_a_permutation(size: int, step: int, seed: int, grouped: bool) -> None:
    sampler = EpochSampler(size, seed, LENGTHS[:size] if grouped else None, step)
    order = list(sampler)
    assert sorted(order) == list(range(size))
    assert len(sampler) == size
    assert list(EpochSampler(size, seed, sampler.lengths, step)) == order


def test_epochs_and_seeds_differ_and_come_back() -> None:
    sampler = EpochSampler(1003, 0, LENGTHS, 8)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert list(EpochSampler(1003, 1, LENGTHS, 8)) != orders[0]


def test_a_step_has_items_of_a_like_length_and_the_longest_comes_first() -> None:
    order = EpochSampler(1003, 0, LENGTHS, 8).order()
    steps = LENGTHS[order[:1000]].reshape(-1, 8)
    spread = (steps.max(1) - steps.min(1)).mean()
    plain = LENGTHS[EpochSampler(1003, 0).order()[:1000]].reshape(-1, 8)
    assert spread < 0.05 * (plain.max(1) - plain.min(1)).mean()
    assert steps[0].max() == steps.max()
    means = steps.mean(1)[1:]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # no drift within the epoch


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_step(ranks: int) -> None:
    """Each step's items are those of one rank alone, divided among the ranks."""
    whole = EpochSampler(1003, 0, LENGTHS, 8).order()[:1000].reshape(-1, 8)
    shares = []
    for rank in range(ranks):
        batches = BatchSampler(EpochSampler(1003, 0, LENGTHS, 8), 8 // ranks, drop_last=False)
        shares.append(list(BatchSamplerShard(batches, ranks, rank))[:125])
    for step, expected in enumerate(whole):
        got = [item for share in shares for item in share[step]]
        assert got == expected.tolist()


def test_what_a_sampler_refuses() -> None:
    with pytest.raises(ValueError, match="lengths must have 5 entries, got 1003"):
        EpochSampler(5, 0, LENGTHS)
    with pytest.raises(ValueError, match="step must be >= 1, got 0"):
        EpochSampler(5, 0, step=0)


def _arguments(**options: Any) -> Any:
    defaults = {"train_sampling_strategy": "random", "seed": 1, "data_seed": None}
    defaults |= {"train_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 2}
    return SimpleNamespace(**defaults | {"ignore_data_skip": False} | options)


def test_the_sampler_of_a_run() -> None:
    assert epoch_sampler([0, 1], _arguments(train_sampling_strategy="sequential")) is None
    assert epoch_sampler(iter([0]), _arguments()) is None
    sampler = epoch_sampler([0, 1], _arguments(data_seed=9))
    assert (sampler.seed, sampler.lengths) == (9, None)
    with pytest.raises(ValueError, match=r"train_dataset must have lengths .*, got list"):
        epoch_sampler([0], _arguments(train_sampling_strategy="group_by_length"))

    class Rows(Dataset):
        lengths = LENGTHS

        def __len__(self) -> int:
            return len(LENGTHS)

    grouped = epoch_sampler(Rows(), _arguments(train_sampling_strategy="group_by_length"))
    assert (grouped.step, len(grouped)) == (12, 1003)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    dataset = [0, 1, 2]
    saved = data_state(dataset, _arguments())
    check_data_state(saved, data_state(dataset, _arguments()), _arguments())
    check_data_state(None, saved, _arguments())
    same_step = _arguments(world_size=1, gradient_accumulation_steps=6)
    check_data_state(saved, data_state(dataset, same_step), same_step)
    for options, named in (({"seed": 2}, "seed 1"), ({"world_size": 4}, "step 12")):
        other = _arguments(**options)
        with pytest.raises(ValueError, match=rf"data must be that of the checkpoint \({named}\)"):
            check_data_state(saved, data_state(dataset, other), other)
    with pytest.raises(ValueError, match=r"\(items 3\), got items 2"):
        check_data_state(saved, data_state([0, 1], _arguments()), _arguments())
    skip = _arguments(ignore_data_skip=True)
    check_data_state(saved, data_state([0, 1], skip), skip)


def test_a_callback_tells_the_epoch() -> None:
    setter = EpochSetter()
    setter.sampler = EpochSampler(10, 0)
    for epoch, expected in ((0, 0), (1.0, 1), (2.75, 2), (None, 0)):
        setter.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert setter.sampler.epoch == expected


def _rows_of_steps(trainer: Any, seen: list[list[int]]) -> None:
    compute = trainer.compute_loss

    def watch(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["row_ids"].tolist())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_in_its_second_epoch_sees_the_rows_that_were_left(
    make_trainer: Callable, tmp_path: Path, strategy: str, workers: int
) -> None:
    options = {
        "train_sampling_strategy": strategy,
        "per_device_train_batch_size": 8,
        "max_steps": 10,  # an epoch is six
        "save_strategy": "steps",
        "save_steps": 8,
        "distillation": "none",
        "omega": 0.0,
        "dataloader_num_workers": workers,
    }
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    again = make_trainer(**options, output_dir=str(tmp_path / "again"))
    seen: tuple[list, list] = ([], [])
    for trainer, rows in zip((whole, again), seen, strict=True):
        _rows_of_steps(trainer, rows)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert sorted(row for step in seen[0][:6] for row in step) == list(range(48))
    assert seen[0][:4] != seen[0][6:]
    assert seen[1] == seen[0][8:]
    with pytest.raises(ValueError, match="data must be that of the checkpoint"):
        make_trainer(**options | {"seed": 7}).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8")
        )
