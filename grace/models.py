"""Models by directory or hub name, as commands and evaluation load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(
    name: str, dtype: str = "auto", device: str | None = None, fuse: bool = True
) -> tuple[Any, Any]:
    """A vision-language model, in eval mode, and its processor.

    Args:
        name: directory or hub name; packed and in-training checkpoints are recognised.
        dtype: one of `DTYPES`; auto: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is slow.
        device: where to run; the GPU if there is one.
        fuse: run packed layers of one input as one call (`grace.nn.fuse`).

    Raises:
        ValueError: an unknown dtype or device, or a checkpoint that is damaged.
        FileNotFoundError: nothing of that name, or an incomplete checkpoint.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grace import nn
    from grace.loading import bad_config_told

    require_checkpoint(name)
    if dtype not in DTYPES:
        raise ValueError(f"model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = _device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    with bad_config_told(f"model: {name} must be a model that transformers loads"):
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=getattr(torch, dtype))
    model.to(place).eval()
    if fuse:
        nn.fuse(model)
    return model, processor


def require_checkpoint(name: str) -> None:
    """Raise FileNotFoundError or ValueError unless `name` is a whole checkpoint, or a hub name."""
    from grace.checkpoint import Checkpoint
    from grace.training.run_config import is_hub_name

    if Path(name).exists() or not is_hub_name(name):
        Checkpoint(name)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"model: device must be cpu or cuda[:n], got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model: device {name} must be there, got a machine without a GPU")
    return device
