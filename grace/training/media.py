"""What rows show: images and videos, opened from paths or bytes."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

# What Pillow raises for files that are torn, cut short, made up, or far too large.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_DECODER = "torchcodec"  # what transformers' video processors decode files with


def open_image(source: Any, root: Path) -> Image.Image:
    """The whole picture in RGB, turned as its EXIF orientation says.

    Args:
        source: a path relative to `root`, bytes of an image file, a `{bytes, path}` mapping (bytes
            where there are any), or a picture.
        root: folder of relative paths.

    Raises:
        ValueError: no such file, or one that cannot be decoded; the message names it.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(BytesIO(source), "bytes of an image")
    path = local_path(source, root)
    if not path.is_file():
        raise ValueError(f"no image {path}")
    return _decode(path, str(path))


def _decode(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def local_path(source: Any, root: Path) -> Path:
    """A path relative to `root`; ValueError for what is no path, such as a URL."""
    return root / _local(source)


def _local(source: Any) -> str:
    if not isinstance(source, str) or not source:
        raise ValueError(f"an image or video must be a path or bytes, got {source!r:.80}")
    if source.startswith("file://"):
        source = source.removeprefix("file://")
    if "://" in source or source.startswith("data:"):
        raise ValueError(f"an image or video must be a local file or bytes, got {source[:80]!r}")
    return source


def missing_files(images: Sequence[Any], videos: Sequence[Any], root: str | Path) -> list[str]:
    """Files that a row names and that are not there; ValueError for what is no path."""
    frames = [
        frame for video in videos for frame in (video if isinstance(video, list) else [video])
    ]
    named = [_named_path(source) for source in (*images, *frames)]
    # os.path and not pathlib: a large data set asks this a million times before it starts.
    paths = [os.path.join(root, _local(source)) for source in named if source is not None]
    return [path for path in paths if not os.path.isfile(path)]


def _named_path(source: Any) -> Any:
    """What of a source is to be looked for as a file; None where it carries its own content."""
    if isinstance(source, dict):
        return None if source.get("bytes") else source.get("path")
    return None if isinstance(source, (bytes, bytearray, memoryview, Image.Image)) else source


def open_video(source: Any, root: Path) -> Any:
    """A video for the processor: the path of a file, or a list of frames as pictures.

    Raises:
        ValueError: no such file, a frame that cannot be decoded.
        ImportError: a video file without torchcodec.
    """
    if isinstance(source, list):
        return [open_image(frame, root) for frame in source]
    path = local_path(source.get("path") if isinstance(source, dict) else source, root)
    if not path.is_file():
        raise ValueError(f"no video {path}")
    if find_spec(_DECODER) is None:
        raise ImportError(
            f"data: a video file needs {_DECODER}, which is not installed; "
            "pip install 'grace-vlm[video]', or give the video as a list of frames"
        )
    return str(path)
