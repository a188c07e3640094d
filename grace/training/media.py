"""What rows show: images and videos, opened from paths or bytes."""

from __future__ import annotations

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
DECODERS = ("torchcodec", "av", "decord", "cv2")


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
    if not isinstance(source, str) or not source:
        raise ValueError(f"an image or video must be a path or bytes, got {source!r:.80}")
    if source.startswith("file://"):
        source = source.removeprefix("file://")
    if "://" in source or source.startswith("data:"):
        raise ValueError(f"an image or video must be a local file or bytes, got {source[:80]!r}")
    return root / source


def missing_files(images: Sequence[Any], videos: Sequence[Any], root: Path) -> list[Path]:
    """Files that a row names and that are not there; ValueError for what is no path."""
    frames = [
        frame for video in videos for frame in (video if isinstance(video, list) else [video])
    ]
    named = [_named_path(source) for source in (*images, *frames)]
    paths = [local_path(source, root) for source in named if source is not None]
    return [path for path in paths if not path.is_file()]


def _named_path(source: Any) -> Any:
    """What of a source is to be looked for as a file; None where it carries its own content."""
    if isinstance(source, dict):
        return None if source.get("bytes") else source.get("path")
    return source if isinstance(source, str) or source is None else None


def open_video(source: Any, root: Path) -> Any:
    """A video for the processor: the path of a file, or a list of frames as pictures.

    Raises:
        ValueError: no such file, a frame that cannot be decoded.
        ImportError: a video file and no package that decodes it.
    """
    if isinstance(source, list):
        return [open_image(frame, root) for frame in source]
    path = local_path(source.get("path") if isinstance(source, dict) else source, root)
    if not path.is_file():
        raise ValueError(f"no video {path}")
    if not any(find_spec(name) for name in DECODERS):
        raise ImportError(
            f"data: a video file needs a decoder ({', '.join(DECODERS)}), got none; "
            "pip install 'grace-vlm[video]', or give the video as a list of frames"
        )
    return str(path)
