"""Where arms run: how many at once, and on which GPU."""

from __future__ import annotations

import os
from multiprocessing import get_all_start_methods
from pathlib import Path

import pytest
import torch

from grace.study import execution
from grace.study.arms import Arm
from grace.study.options import from_dict
from grace.study.task import Task


def task(tmp_path: Path, device: str, processes: int | None) -> Task:
    config = from_dict({"benchmark": "synthetic", "processes": processes})
    return Task(Arm("student"), 0, config, tmp_path, device)


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert execution.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert execution.gpus() == ["5", "GPU-ab"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert execution.gpus() == []


def test_every_gpu_has_as_many_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(execution, "cores", lambda: 12)
    assert execution._processes(task(tmp_path, "cuda", 2)) == 4
    assert execution._processes(task(tmp_path, "cuda", None)) == 12  # six cores for each
    assert execution._processes(task(tmp_path, "cpu", 2)) == 2
    assert execution._processes(task(tmp_path, "cpu", None)) == 12


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "gpus", lambda: ["3", "5"])
    given = []
    pool = execution.ProcessPoolExecutor
    monkeypatch.setattr(
        execution, "ProcessPoolExecutor", lambda *args: given.append(args[-1]) or pool(*args)
    )
    with execution.worker_pool(3) as executor:
        assert executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(timeout=120) == "3"
    ((places,),) = given
    assert [places.get(timeout=5) for _ in range(2)] == ["5", "3"]


def test_without_a_gpu_nothing_is_said_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(execution, "gpus", list)
    with execution.worker_pool(1) as executor:
        assert executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(timeout=120) is None


class _NotToBeSent(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return os.getppid()

    def __reduce__(self) -> tuple:
        raise AssertionError("a loader must be forked, and its data not be sent")


def _parent_of_a_loader() -> tuple[int, int]:
    from torch.utils.data import DataLoader

    (parent,) = DataLoader(_NotToBeSent(), batch_size=None, num_workers=1)
    return int(parent), os.getpid()


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="no fork here")
def test_loaders_of_an_arm_are_forked() -> None:
    with execution.worker_pool(1) as executor:
        parent, process = executor.submit(_parent_of_a_loader).result(timeout=120)
    assert parent == process


def test_a_process_that_sees_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(execution.worker, "use_one_thread", lambda: None)

    class Places:
        def get(self) -> str:
            return "1"

    with pytest.raises(RuntimeError, match=r"a process must see one GPU, got 2"):
        execution._begin(Places())


def _fail_or_write(path: str) -> str:
    if "bad" in path:
        raise ValueError("x must be y, got z")
    Path(path).write_text("done")
    return path


def test_what_fails_keeps_no_other_from_its_end(tmp_path: Path) -> None:
    names = ["bad-1", "good", "bad-2"]
    with execution.worker_pool(1) as executor:
        futures = {
            executor.submit(_fail_or_write, str(tmp_path / name)): execution.Part(
                name, 1, tmp_path / "none"
            )
            for name in names
        }
        results, errors = execution._follow(executor, futures, execution.Progress())
    assert results == {"good": str(tmp_path / "good")}
    assert (tmp_path / "good").read_text() == "done"
    assert list(errors) == ["bad-1", "bad-2"]
    with pytest.raises(RuntimeError, match=r"bad-1, bad-2 failed.*bad-1: ValueError: x must be y"):
        raise execution.Failed(errors)
