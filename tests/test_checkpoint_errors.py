"""Damage of every kind, met by everything that reads or writes checkpoints: told, and nothing done.

What is written must be whole or not there; what is read must be as it was written, or an error that
names the file or tensor; a pickle is never run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import packed_models
import processes
import pytest
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import grace
from grace.cli import main

Q = "model.layers.1.self_attn.q_proj"
SHARDS = 3


def trained() -> Any:
    model = models.qwen2()
    grace.quantize(model, group_size=32)
    return model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One packed checkpoint, in three shards."""
    directory = tmp_path_factory.mktemp("pristine") / "src"
    grace.export(trained(), directory, max_shard_size="45KB")
    assert len(list(directory.glob("*.safetensors"))) == SHARDS
    return directory


@pytest.fixture
def src(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(pristine, tmp_path / "src")


# --- damage --------------------------------------------------------------------------------------


def shard_with(src: Path, name: str) -> Path:
    index = json.loads((src / "model.safetensors.index.json").read_text())
    return src / index["weight_map"][name]


def change(name: str, by: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """Damage that rewrites a tensor, or (None) leaves it out of its shard and the index."""

    def damage(src: Path) -> None:
        file = shard_with(src, name)
        tensors = load_file(file)
        if by is None:
            del tensors[name]
            index = json.loads((src / "model.safetensors.index.json").read_text())
            del index["weight_map"][name]
            (src / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            tensors[name] = by(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def shard(number: int, edit: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    def damage(src: Path) -> None:
        file = src / f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        file.write_bytes(edit(bytearray(file.read_bytes())))

    return damage


def replaced(old: bytes, new: bytes) -> Callable[[bytearray], bytes]:
    def edit(content: bytearray) -> bytes:
        assert old in content
        return bytes(content).replace(old, new, 1)

    return edit


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(src: Path) -> None:
        content = json.loads((src / "config.json").read_text())
        weights = content["quantization_config"]["config_groups"]["group_0"]["weights"]
        for key, value in changes.items():
            (weights if key in weights else content)[key] = value
        (src / "config.json").write_text(json.dumps(content))

    return damage


def flip_brace(src: Path) -> None:
    content = bytearray((src / "config.json").read_bytes())
    content[content.index(b"{", 1)] ^= 4
    (src / "config.json").write_bytes(bytes(content))


def lose_shard(src: Path) -> None:
    (src / f"model-00002-of-{SHARDS:05d}.safetensors").unlink()


def flip_length(content: bytearray) -> bytes:
    content[0] ^= 1
    return bytes(content)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "from_pretrained": lambda src, _: transformers.AutoModelForCausalLM.from_pretrained(src),
    "export": lambda src, out: grace.export(src, out),
    "import": lambda src, out: grace.import_published(src, out),
}
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (
        shard(2, lambda content: bytes(content[:-7])),
        r"model-00002-of-00003.safetensors must have \d+ bytes, got \d+",
    ),
    "shard cut within its header": (
        shard(1, lambda content: bytes(content[:99])),
        r"model-00001-of-00003.safetensors must be a safetensors file, got 99 other bytes",
    ),
    "empty shard": (
        shard(3, lambda _: b""),
        r"model-00003-of-00003.safetensors must be a safetensors file, got 0 other bytes",
    ),
    "flipped bit in a header's length": (
        shard(1, flip_length),
        r"model-00001-of-00003.safetensors must be a safetensors file",
    ),
    "flipped byte in a header's dtype": (
        shard(2, replaced(b'"dtype":"BF16"', b'"dtype":"BF1V"')),
        r"model-00002-of-00003.safetensors must be a whole file, got .*BF1V",
    ),
    "flipped byte in a header's shape": (
        shard(2, replaced(b'"shape":[64,', b'"shape":[65,')),
        r"model-00002-of-00003.safetensors must be a whole file",
    ),
    "flipped byte in a header's name": (
        shard(2, replaced(b"weight_packed", b"weight_qacked")),
        r"must hold .*weight_packed|model-00002-of-00003.safetensors must hold",
    ),
    "flipped byte in the config": (flip_brace, r"config.json.*"),
    "missing shard": (lose_shard, r"model-00002-of-00003.safetensors"),
    "missing codes": (change(f"{Q}.weight_packed", None), rf"{Q}\.weight_packed|{Q}"),
    "missing scales": (change(f"{Q}.weight_scale", None), rf"{Q}\.weight_scale|{Q}"),
    "missing shape": (change(f"{Q}.weight_shape", None), rf"{Q}\.weight_shape|{Q}"),
    "missing bias": (change(f"{Q}.bias", None), rf"got no {Q}\.bias"),
    "missing norm": (change("model.norm.weight", None), r"got no model\.norm\.weight"),
    "missing embedding": (
        change("model.embed_tokens.weight", None),
        r"got no model\.embed_tokens\.weight",
    ),
    "wrong group size": (
        config(group_size=16),
        r"weight_scale must be \[64, [48]\].* got \[64, [24]\]",
    ),
    "wrong number of bits": (
        config(num_bits=8),
        r"weight_packed must be \[64, (16|32)\].*\[64, (8|16)\]",
    ),
    "wrong width in the config": (config(hidden_size=32), r"must be .*32.*, got .*64"),
    "wrong vocabulary in the config": (
        config(vocab_size=97),
        r"must be \[97, 64\], got \[96, 64\]",
    ),
    "wrong shape of codes": (change(f"{Q}.weight_packed", lambda t: t[:, 1:].clone()), rf"{Q}"),
    "wrong shape of scales": (change(f"{Q}.weight_scale", lambda t: t[1:].clone()), rf"{Q}"),
    "wrong weight_shape": (change(f"{Q}.weight_shape", lambda t: t * 2), rf"{Q}.*128, 128"),
    "wrong shape of a norm": (
        change("model.norm.weight", lambda t: t[1:].clone()),
        r"model\.norm\.weight must be \[64\], got \[63\]",
    ),
    "codes of floats": (change(f"{Q}.weight_packed", lambda t: t.float()), rf"{Q}"),
    "scales of integers": (change(f"{Q}.weight_scale", lambda t: t.int()), rf"{Q}"),
    "scales that are not finite": (
        change(f"{Q}.weight_scale", lambda t: t * float("nan")),
        r"scales .*must be finite",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_by_name(damage: str, reader: str, src: Path, tmp_path: Path):
    inflict, message = DAMAGE[damage]
    inflict(src)
    with pytest.raises((ValueError, OSError), match=message):
        READERS[reader](src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def certified(src: Path) -> bool:
    """Whether the files are there, whole, and as their certificate says."""
    try:
        return grace.export.verify(src).ok
    except (ValueError, OSError):
        return False


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_it_in_the_files_alone(damage: str, src: Path):
    """By the certificate's hashes, without a reference."""
    assert certified(src)
    DAMAGE[damage][0](src)
    assert not certified(src)


@pytest.mark.parametrize("part", ["config", "header"])
def test_any_flipped_bit_is_told_or_certified_against(part: str, pristine: Path, src: Path):
    """What loads all the same is another file than the certificate's."""
    name = {"config": "config.json", "header": "model-00002-of-00003.safetensors"}[part]
    content = (pristine / name).read_bytes()
    size = len(content) if part == "config" else 8 + struct.unpack("<Q", content[:8])[0]
    told = 0
    for place in range(3, size, size // 24):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        (src / name).write_bytes(bytes(flipped))
        try:
            grace.export.load(src)
        except (ValueError, OSError):
            told += 1
            continue
        assert not certified(src)
    assert told > 12


# --- pickles -------------------------------------------------------------------------------------


class Trap:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("reader", [*READERS, "verify"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "extra.pt"])
def test_a_pickle_with_code_inside_is_not_run(
    file: str, reader: str, pristine: Path, tmp_path: Path
):
    """As the weights, under the name of safetensors, and beside good ones."""
    mark, src = tmp_path / "ran", tmp_path / "src"
    if file == "extra.pt":
        shutil.copytree(pristine, src)
    else:
        src.mkdir()
        shutil.copyfile(pristine / "config.json", src / "config.json")
    (src / file).write_bytes(pickle.dumps({"model.norm.weight": Trap(mark)}))
    readers = {**READERS, "verify": lambda src, _: grace.export.verify(src, trained())}
    beside_good = file == "extra.pt" and reader in ("from_pretrained", "export")  # never opened
    refused = pytest.raises((ValueError, OSError, pickle.UnpicklingError, ImportError))
    with contextlib.nullcontext() if beside_good else refused:
        readers[reader](src, tmp_path / "out")
    assert not mark.exists()
    assert {"src", *(["out"] if beside_good and reader == "export" else [])} == set(
        os.listdir(tmp_path)
    )
    pickle.loads((src / file).read_bytes())
    assert mark.exists()  # the trap works


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The system refuses every write past ``size`` bytes of a file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_by(writer: str, pristine: Path, out: Path) -> Any:
    if writer == "import":
        return grace.import_published(pristine, out, overwrite=True)
    return grace.export(trained(), out, writer, overwrite=True)


WRITERS = ["compressed-tensors", "awq", "gptq", "import"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("size", [100, 60_000])
@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_takes_no_more(
    writer: str, size: int, there: bool, pristine: Path, tmp_path: Path
):
    """In the config, and in the middle of the weights; over nothing, and over a checkpoint."""
    out = tmp_path / "out"
    if there:
        shutil.copytree(pristine, out)
    with files_no_longer_than(size), pytest.raises(OSError, match=r"[Ff]ile too large"):
        write_by(writer, pristine, out)
    assert os.listdir(tmp_path) == (["out"] if there else [])
    if there:
        assert grace.export.verify(out).ok


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a disk of its own")
@pytest.mark.parametrize("kilobytes", [4, 40, 100])
def test_a_full_disk(kilobytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A real one: the message says what for and how much, nothing is left on it."""
    disk, student = tmp_path / "disk", tmp_path / "student"
    disk.mkdir()
    trained().save_pretrained(student)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk of its own")
    try:
        with pytest.raises(SystemExit) as stop:
            main(["export", str(student), str(disk / "out"), "--max-shard-size", "50KB"])
        left = os.listdir(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("grace: ")
    assert "No space left on device" in told
    assert left == []


@pytest.mark.parametrize("place", [1, 2])
def test_no_space_at_any_file(
    place: int, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """ENOSPC from the n-th file that is opened for writing."""
    opened = 0
    open_ = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        nonlocal opened
        if mode[0] in "wx" and tmp_path in self.parents:
            opened += 1
            if opened == place:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return open_(self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left on device"):
        grace.import_published(pristine, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_cannot_be_written(
    writer: str, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Told before a model is looked at."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="dst must be in a directory, got the file"):
        write_by(writer, pristine, tmp_path / "file" / "out")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    with pytest.raises(PermissionError, match="dst must be in a directory to write in, got"):
        write_by(writer, pristine, tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_place_that_is_taken(
    command: str, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("dear")
    for options, message in [
        ([], "must be new or empty, or overwritten on purpose"),
        (["--overwrite"], "dst must hold a checkpoint to overwrite, got"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([command, str(pristine), str(tmp_path / "out"), *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "letter").read_text() == "dear"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export(kill: signal.Signals, pristine: Path, tmp_path: Path):
    """What stood there still stands; after Ctrl-C nothing else does, after a kill nothing whole."""
    out, begun = tmp_path / "out", tmp_path / "begun"
    shutil.copytree(pristine, out)
    process = processes.start(partial(packed_models.import_slowly, pristine, out, begun))
    while not begun.exists():
        assert process.exitcode is None
        process.join(0.05)
    os.kill(process.pid, kill)
    process.join(60)
    assert process.exitcode not in (None, 0)
    assert grace.export.verify(out).ok
    left = set(os.listdir(tmp_path)) - {"out", "begun"}
    assert len(left) == (kill == signal.SIGKILL)
    for name in left:
        assert name.endswith(".partial")
        with pytest.raises((ValueError, OSError)):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
