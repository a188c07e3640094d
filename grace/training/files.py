"""Files that are whole or not there, and still there after a crash of the machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def sync_tree(directory: Path) -> None:
    """Have everything in `directory`, and it itself, on the disk and not only in a cache."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(beside: Path, place: Path) -> None:
    """Rename a finished directory to its place; what stood there goes only afterwards."""
    sync_tree(beside)
    replaced = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if place.exists():
        os.replace(place, replaced)
    os.replace(beside, place)
    _sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_whole(path: Path, text: str) -> Path:
    """Write a text file beside its place and rename it into it."""
    beside = path.with_name(f".{path.name}.unfinished")
    beside.write_text(text)
    _sync(beside)
    os.replace(beside, path)
    return path


def require_writable(directory: Path) -> None:
    """OSError unless files can be written in `directory`, or where it would be made.

    Nothing is left of the attempt, and `directory` is not made.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".writable-") as probe:
            probe.write(b"0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OSError(
            f"train: output_dir must be a directory that can be written, got {directory}: {error}"
        ) from error


def require_room(directory: Path, needed: int, what: str) -> None:
    """OSError where the disk of `directory` has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"train: output_dir must have {needed / 2**30:.1f} GiB free for {what}, got "
            f"{free / 2**30:.1f} GiB in {directory}"
        )
