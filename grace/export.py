"""Export: a trained low-bit model becomes a checkpoint that servers and transformers read.

`grace.export(src, dst)` calls `export` of this module; `grace.export.verify` is `verify`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from grace.checkpoint import Checkpoint, check_target, copy_companions, written_whole
from grace.formats.compressed_tensors import encode
from grace.formats.compressed_tensors_config import METHOD
from grace.nn import FakeQuantLinear, PackedLinear
from grace.quantization import check_packable, packed_config
from grace.verification import Certificate, verify

__all__ = ["Certificate", "export", "load", "verify"]

FORMATS = (METHOD,)


def export(
    src: nn.Module | str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = METHOD,
    *,
    processor: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """Writes a low-bit model as a packed checkpoint, and proves that it is the same model.

    The checkpoint is written beside ``dst``, verified against ``src`` tensor by tensor and by its
    logits, and only then takes its place; ``grace_certificate.json`` in it says what was compared.

    Args:
        src: a transformers model with `FakeQuantLinear` or `PackedLinear` layers, or a directory
            that such a model (or `GraceTrainer`) was saved in.
        dst: directory to write; must not exist, or be empty.
        format: "compressed-tensors" (pack-quantized), which vLLM, SGLang and transformers read.
        processor: processor or tokenizer to save with the model; those of a ``src`` directory are
            copied without asking.
        dtype: dtype of everything that is not quantized; None leaves it as it is.
        max_shard_size: largest size of a file, as in `save_pretrained`.
        overwrite: replace the checkpoint that ``dst`` holds.
        inputs: keyword arguments of the model's forward for comparing logits; None: a short batch
            of random tokens.

    Returns:
        The certificate.

    Raises:
        ValueError: a format that is not there, layers of neither 4 nor 8 bits, a ``dst`` that holds
            something, a ``src`` that is damaged or holds no low-bit layers.
        FileNotFoundError, NotADirectoryError: ``src``, or a part of it, is missing.
        RuntimeError: what was written is not what ``src`` holds; ``dst`` is then as it was.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format}")
    target = Path(dst).resolve()
    check_target(target, overwrite)
    source = None if isinstance(src, nn.Module) else Path(src).resolve()
    if source is not None and (source == target or target in source.parents):
        raise ValueError(f"export: dst must not hold src, got {target}")
    model = src if isinstance(src, nn.Module) else load(src)
    config = _checked_config(model)
    with written_whole(target, overwrite) as partial:
        _write(model, config, partial, dtype, max_shard_size)
        if processor is not None:
            processor.save_pretrained(partial)
        if source is not None:
            copy_companions(source, partial)
        certificate = verify(partial, model, inputs=inputs)
        if not certificate.ok:
            raise RuntimeError(f"export: checkpoint differs from src: {certificate.differences[0]}")
    return certificate


def load(directory: str | os.PathLike[str]) -> nn.Module:
    """The model of a directory, by the architecture that its config names, nothing missing.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: the directory does not hold a whole model
            in safetensors.
    """
    import transformers

    names = Checkpoint(directory).config.get("architectures") or [None]
    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None:
        raise ValueError(
            f"checkpoint: architectures must name a transformers model, got {names[0]}"
        )
    model, info = architecture.from_pretrained(directory, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise ValueError(f"checkpoint: {directory} must hold the whole model, got no {first}")
    return model


def _checked_config(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"export: src must be a transformers model, got {type(model).__name__}")
    if not any(isinstance(module, FakeQuantLinear | PackedLinear) for module in model.modules()):
        raise ValueError("export: src must hold FakeQuantLinear or PackedLinear layers, got none")
    check_packable("export", model)
    return packed_config(model)


def _write(
    model: Any,
    config: dict[str, Any],
    directory: Path,
    dtype: torch.dtype | None,
    max_shard_size: str | int,
) -> None:
    with _without_quantizer(model, config):
        state = packed_state(model) if dtype is None else _cast(packed_state(model), dtype)
        model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
    if dtype is not None:
        file = directory / "config.json"
        written = json.loads(file.read_text(encoding="utf-8"))
        _set_dtype(written, str(dtype).split(".")[-1])
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with every low-bit layer in the format's three tensors."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            del state[f"{name}.weight"], state[f"{name}.log_scale"]
            encoded = encode(*module.quantize(), module.bits)
            state.update({f"{name}.{key}": tensor for key, tensor in encoded.items()})
    return state


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay one tensor
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.endswith(".weight_scale"):
            key = (tensor.data_ptr(), tensor.shape)
            state[name] = cast.setdefault(key, tensor.to(dtype))
    return state


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict) and "dtype" in value:
            _set_dtype(value, dtype)


@contextlib.contextmanager
def _without_quantizer(model: Any, config: dict[str, Any]) -> Iterator[None]:
    """Lets `save_pretrained` take our tensors, where a model's quantizer would put its own."""
    missing = object()
    quantizer = model.__dict__.pop("hf_quantizer", missing)
    before = getattr(model.config, "quantization_config", missing)
    model.config.quantization_config = config
    try:
        yield
    finally:
        if quantizer is not missing:
            model.hf_quantizer = quantizer
        if before is missing:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


class _CallableModule(ModuleType):
    """This module, which is also the function: ``grace.export(src, dst)``."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _CallableModule
