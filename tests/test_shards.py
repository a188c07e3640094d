from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grace import shards
from grace.checkpoint import Checkpoint
from grace.shards import ShardWriter, parse_size


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, alive, held = shards.save_file, [], []

    def recorded(tensors: dict, *rest, **named) -> None:
        held.append(sum(reference() is not None for reference in alive))
        save(tensors, *rest, **named)

    monkeypatch.setattr(shards, "save_file", recorded)
    writer, expected = ShardWriter(tmp_path, 1000), {}
    for index in range(10):
        tensor = torch.full((100,), index, dtype=torch.float32)  # 400 bytes: two a shard
        alive.append(weakref.ref(tensor.untyped_storage()))
        expected[f"t{index}"] = tensor.clone()
        writer.add(f"t{index}", tensor)
        del tensor
    writer.finish()
    assert len(held) == 5
    assert max(held) <= 3  # a shard, and the tensor that did not fit in it
    names = {file.name for file in tmp_path.iterdir()}
    files = {f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)}
    assert names == files | {"model.safetensors.index.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    (tmp_path / "config.json").write_text("{}")
    read = dict(Checkpoint(tmp_path).read())
    assert read.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_what_fits_is_one_file_without_an_index(tmp_path: Path):
    writer, whole = ShardWriter(tmp_path), torch.arange(6.0)
    for name, tensor in (("a", whole[:3]), ("b", whole), ("c", whole.view(2, 3).t())):
        writer.add(name, tensor)  # of one memory, one not contiguous
    with pytest.raises(ValueError, match="names of tensors must be unique, got a twice"):
        writer.add("a", whole)
    writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["a"].tolist() == [0, 1, 2]
    assert tensors["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (30_000, 30_000), ("7", 7), ("2kb", 2000)],
)
def test_sizes(size: str | int, expected: int):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1GB", 0, "0.1B"])
def test_what_is_no_size_is_refused(size: str | int):
    with pytest.raises(ValueError, match="max_shard_size must be a size such as 5GB, got"):
        parse_size(size)
