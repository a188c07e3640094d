from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grace.checkpoint import INDEX, SINGLE, Checkpoint, copy_companions, read_header, written_whole


def make(directory: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    tensors = {f"layer.{i}": torch.full((i + 1, 2), float(i)) for i in range(4)}
    if shards == 1:
        save_file(tensors, directory / SINGLE)
        return tensors
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(shards: int, tmp_path: Path):
    tensors = make(tmp_path, shards)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) == shards
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    read = dict(checkpoint.read())
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 10**12) + b"{",
        struct.pack("<Q", 4) + b"[12]" + b"0" * 8,
        struct.pack("<Q", 13) + b'{"a":{"b":1}}',
        b"\x80\x04\x95pickle of some kind",
    ],
)
def test_files_that_are_no_safetensors_are_refused(content: bytes, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint: model.safetensors must be a safetensors"):
        read_header(file)


@pytest.mark.parametrize("change", [-1, 5])
def test_truncated_and_padded_files_are_refused(change: int, tmp_path: Path):
    make(tmp_path)
    file = tmp_path / SINGLE
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + b"0" * change)
    with pytest.raises(ValueError, match=rf"must have {len(content)} bytes, got"):
        Checkpoint(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(NotADirectoryError, match="must be a directory, got nothing"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a directory, got a file"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"config.json must exist"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path.name}/config.json must be JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"must be safetensors, got the pickle pytorch_model.bin"):
        Checkpoint(tmp_path)


def test_shards_must_be_whole(tmp_path: Path):
    make(tmp_path, 3)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["layer.9"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00003.safetensors must hold layer.9"):
        Checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00003.safetensors"):
        Checkpoint(tmp_path)
    index["weight_map"]["layer.9"] = "../secret.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name files beside it, got ../secret"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="must have a weight_map"):
        Checkpoint(tmp_path)


def test_companions_are_copied_once(tmp_path: Path):
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "x.jinja").write_text("x")
    target.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "optimizer.pt", "trainer_state.json"):
        (source / name).write_text("source")
    (target / "generation_config.json").write_text("target")
    copied = copy_companions(source, target)
    assert sorted(copied) == ["additional_chat_templates", "tokenizer.json"]
    assert (target / "generation_config.json").read_text() == "target"
    assert not (target / "optimizer.pt").exists()


def test_a_directory_is_written_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with written_whole(target) as partial:
        (partial / "config.json").write_text("{}")
        assert not target.exists()
    assert [f.name for f in target.iterdir()] == ["config.json"]

    def fail() -> None:
        with written_whole(target, overwrite=True) as partial:
            (partial / "other").write_text("")
            raise KeyError("half way")

    with pytest.raises(KeyError):
        fail()
    assert [f.name for f in target.iterdir()] == ["config.json"]
    with written_whole(target, overwrite=True) as partial:
        (partial / "new").write_text("")
    assert [f.name for f in target.iterdir()] == ["new"]
    assert [f.name for f in target.parent.iterdir()] == ["out"]


def test_only_checkpoints_are_overwritten(tmp_path: Path):
    target = tmp_path / "home"
    target.mkdir()
    with written_whole(target) as partial:  # an empty directory is taken
        (partial / "letter").write_text("dear")
    for overwrite, message in [(False, "must be new or empty"), (True, "must hold a checkpoint")]:
        with pytest.raises(ValueError, match=message), written_whole(target, overwrite):
            pass
    with (
        pytest.raises(ValueError, match="dst must be a directory"),
        written_whole(target / "letter"),
    ):
        pass
    assert (target / "letter").read_text() == "dear"
