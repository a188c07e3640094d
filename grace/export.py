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
from grace.formats.compressed_tensors import Scheme
from grace.formats.layouts import COMPRESSED, LAYOUTS, Layout
from grace.importing import readable
from grace.loading import bad_config_told
from grace.nn import FakeQuantLinear, PackedLinear
from grace.quantization import check_packable, packed_config
from grace.shards import ShardWriter
from grace.verification import Certificate, verify

__all__ = ["Certificate", "export", "load", "verify"]

FORMATS = tuple(LAYOUTS)
LowBit = FakeQuantLinear | PackedLinear
_MARK = "weight_packed"


def export(
    src: nn.Module | str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = COMPRESSED.name,
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
        format: "compressed-tensors" (pack-quantized), which vLLM, SGLang and transformers read;
            "awq" (GEMM layout, 4 bits) or "gptq" (version 1) for programs that read only those.
            These two hold scales in float16: others than those it holds exactly are refused.
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
    layout = LAYOUTS[format]
    config = _checked_config(model, layout)
    with written_whole(target, overwrite) as partial:
        _write(model, layout, config, partial, dtype, max_shard_size)
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
    must = f"checkpoint: {directory} must hold a {names[0]} that transformers loads"
    with readable(directory) as copy, bad_config_told(must):
        model, info = architecture.from_pretrained(copy, dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise ValueError(f"checkpoint: {directory} must hold the whole model, got no {first}")
    return model


def _checked_config(model: nn.Module, layout: Layout) -> dict[str, Any]:
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"export: src must be a transformers model, got {type(model).__name__}")
    if not any(isinstance(module, FakeQuantLinear | PackedLinear) for module in model.modules()):
        raise ValueError("export: src must hold FakeQuantLinear or PackedLinear layers, got none")
    check_packable("export", model)
    return packed_config(model, layout)


def _write(
    model: Any,
    layout: Layout,
    config: dict[str, Any],
    directory: Path,
    dtype: torch.dtype | None,
    max_shard_size: str | int,
) -> None:
    _write_config(model, config, directory, dtype)
    dense, layers = _on_disk(model)
    writer = ShardWriter(directory, max_shard_size)
    for name, tensor in dense.items():
        cast = dtype is not None and tensor.is_floating_point()
        writer.add(name, tensor.to(dtype) if cast else tensor)
    for name, layer in layers.items():  # one layer's codes at a time
        scheme = Scheme(layer.bits, layer.group_size)
        for part, tensor in layout.encode(*_codes_and_scales(layer), scheme, name).items():
            writer.add(f"{name}.{part}", tensor)
    writer.finish()


def _write_config(
    model: Any, config: dict[str, Any], directory: Path, dtype: torch.dtype | None
) -> None:
    model.config.dtype = str(model.dtype).split(".")[-1]
    model.config.architectures = [type(model).__name__]
    with _quantization_config(model, config):
        model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, directory, config=model.config)
    if dtype is not None:
        file = directory / "config.json"
        written = json.loads(file.read_text(encoding="utf-8"))
        _set_dtype(written, str(dtype).split(".")[-1])
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _on_disk(model: Any) -> tuple[dict[str, Tensor], dict[str, LowBit]]:
    """By their names in files: tensors that are not quantized, not copied, and low-bit layers."""
    from transformers.core_model_loading import revert_weight_conversion

    layers: list[LowBit] = []
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(module, LowBit):
            module._save_to_state_dict(state, prefix, keep_vars=False)
            continue
        if module.bias is not None:
            state[f"{prefix}bias"] = module.bias.detach()
        state[f"{prefix}{_MARK}"] = torch.tensor(len(layers))  # to be found again when renamed
        layers.append(module)
    for unsaved in (
        *(getattr(model, "all_tied_weights_keys", None) or ()),
        *(getattr(model, "_keys_to_ignore_on_save", None) or ()),
    ):
        state.pop(unsaved, None)
    named = revert_weight_conversion(model, state)
    marks = {name: int(mark) for name, mark in named.items() if name.endswith(f".{_MARK}")}
    dense = {name: tensor for name, tensor in named.items() if name not in marks}
    return dense, {name.removesuffix(f".{_MARK}"): layers[i] for name, i in marks.items()}


def _codes_and_scales(layer: LowBit) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        pair = layer.quantize() if isinstance(layer, FakeQuantLinear) else layer.unpack()
    return pair[0].cpu(), pair[1].cpu()


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict) and "dtype" in value:
            _set_dtype(value, dtype)


@contextlib.contextmanager
def _quantization_config(model: Any, config: dict[str, Any]) -> Iterator[None]:
    missing = object()
    before = getattr(model.config, "quantization_config", missing)
    model.config.quantization_config = config
    try:
        yield
    finally:
        if before is missing:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


class _CallableModule(ModuleType):
    """This module, which is also the function: ``grace.export(src, dst)``."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _CallableModule
