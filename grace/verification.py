"""Verification: what a packed checkpoint holds, compared with the model that it was made from.

Nothing here uses the code that packs or writes: words are taken apart by shifts, names come from
transformers, so that an error in the export cannot hide in the check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grace.certificate import Certificate, check_files, start
from grace.checkpoint import DTYPES, PICKLES, Checkpoint
from grace.formats import awq, gptq
from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import read_config
from grace.importing import readable
from grace.logits_check import compare_logits, run_dtype
from grace.nn import FakeQuantLinear, PackedLinear
from grace.stored import PARTS, method_of, read

_ON_STATE = ("weight_packed", "weight_scale", "weight_shape", "weight", "log_scale")
_QUANTIZED = tuple(f".{part}" for parts in PARTS.values() for part in parts)
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of logits

LowBit = FakeQuantLinear | PackedLinear


def verify(
    dst: str | os.PathLike[str],
    reference: nn.Module | str | os.PathLike[str] | None = None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """Compares a packed checkpoint with the model that it was made from, and certifies the result.

    Compared are: names of all tensors; for every quantized layer its codes, its scales, and the
    weight they stand for with the one that the reference multiplies with, bit for bit; all other
    tensors, in the dtype they were saved in; codes and scales once more after loading by
    `from_pretrained`; and the logits of the loaded model. ``dst`` gets ``grace_certificate.json``.

    Args:
        dst: directory of a checkpoint in any format that `grace.export` writes.
        reference: the model (`FakeQuantLinear` or `PackedLinear` layers) or its directory; None
            compares the files with the certificate that they came with.
        inputs: keyword arguments of the model's forward; None: a short batch of random tokens.

    Returns:
        The certificate; its ``ok`` is False when anything differs.

    Raises:
        FileNotFoundError, NotADirectoryError: a file or directory is missing.
        ValueError: a damaged or pickled file, a config of another format.
    """
    checkpoint = Checkpoint(dst)
    _refuse_pickles(checkpoint.directory)
    if reference is None:
        return check_files(checkpoint)
    if not isinstance(reference, nn.Module):
        from grace.export import load

        reference = load(reference)
    certificate = start(checkpoint)
    _compare_tensors(checkpoint, reference, certificate)
    if certificate.ok:
        _compare_loaded(checkpoint, reference, inputs, certificate)
    certificate.write(checkpoint.directory)
    return certificate


@torch.no_grad()
def _compare_tensors(checkpoint: Checkpoint, model: Any, certificate: Certificate) -> None:
    dense, packed = _expected(model)
    config = checkpoint.config.get("quantization_config") or {}
    method = method_of(config)
    scheme_of = _schemes(method, config)
    names = {f"{stem}.{part}": stem for stem in packed for part in PARTS[method]}
    for name in sorted((dense.keys() | names.keys()) ^ checkpoint.tensors.keys()):
        where = "missing in" if name not in checkpoint.tensors else "unknown to the reference, in"
        certificate.differences.append(f"{name}: {where} the checkpoint")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.read():
        if name in dense:
            certificate.other_tensors += 1
            if not _same(tensor, dense[name].cpu().to(tensor.dtype)):
                certificate.differences.append(f"{name}: values differ")
        elif name in names:
            stem = names[name]
            own = parts.setdefault(stem, {})
            own[name.removeprefix(f"{stem}.")] = tensor
            if len(own) == len(PARTS[method]):
                module_name, module = packed[stem]
                scheme = scheme_of(module_name)
                if scheme != (module.bits, module.group_size):
                    certificate.differences.append(f"{stem}: config says {scheme}")
                found = _compare_layer(method, own, module)
                certificate.differences += [f"{stem}: {difference}" for difference in found]
                certificate.quantized_layers += 1
                certificate.codes += module.in_features * module.out_features
                parts[stem] = {}


def _schemes(method: str, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """Scheme of a module by its name, as the checkpoint's config says."""
    if method == "compressed-tensors":
        layout = read_config(config)
        return lambda name: layout.scheme_of(name, ["Linear"])
    scheme = awq.read_config(config) if method == "awq" else gptq.read_config(config).scheme
    return lambda name: scheme


def _compare_layer(method: str, parts: Mapping[str, Tensor], module: LowBit) -> Iterator[str]:
    expected_codes, expected_scales = _codes_and_scales(module)
    shape = (module.out_features, module.in_features)
    codes, scales, faults = read(method, parts, module.bits, shape)
    if faults:
        yield from faults
        return
    if not torch.equal(codes, expected_codes.long()):
        yield "codes differ"
    dtype = expected_scales.dtype if method == "compressed-tensors" else torch.float16
    if scales.dtype != dtype or not torch.equal(scales.double(), expected_scales.double()):
        yield "scales differ"
        return
    weight = (
        module.quantized_weight() if isinstance(module, FakeQuantLinear) else module.dequantize()
    )
    groups = codes.float().view(module.out_features, scales.shape[1], -1)
    product = (groups * scales.float().unsqueeze(-1)).flatten(1).to(weight.dtype)
    if not torch.equal(product, weight.cpu()):
        yield "dequantized weight differs"


def _codes_and_scales(module: LowBit) -> tuple[Tensor, Tensor]:
    codes, scales = module.quantize() if isinstance(module, FakeQuantLinear) else module.unpack()
    return codes.cpu(), scales.cpu()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _expected(model: Any) -> tuple[dict[str, Tensor], dict[str, tuple[str, LowBit]]]:
    """By their names on disk: the tensors that are not quantized, and the layers that are."""
    from transformers.core_model_loading import revert_weight_conversion

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LowBit)]
    state = dict(model.state_dict())
    for tied in getattr(model, "all_tied_weights_keys", None) or ():
        state.pop(tied, None)
    for index, (name, _) in enumerate(layers):
        for part in _ON_STATE:
            state.pop(f"{name}.{part}", None)
        state[f"{name}.weight_packed"] = torch.tensor(index)  # a layer's mark, to be found again
    on_disk = revert_weight_conversion(model, state)
    ending = ".weight_packed"
    packed = {
        name.removesuffix(ending): layers[int(mark)]
        for name, mark in on_disk.items()
        if name.endswith(ending)
    }
    return {name: t for name, t in on_disk.items() if not name.endswith(ending)}, packed


def _compare_loaded(
    checkpoint: Checkpoint,
    reference: Any,
    inputs: Mapping[str, Tensor] | None,
    certificate: Certificate,
) -> None:
    with readable(checkpoint.directory) as directory:
        loaded = type(reference).from_pretrained(directory, dtype=run_dtype(reference))
    for name, module in reference.named_modules():
        if not isinstance(module, LowBit):
            continue
        other = loaded.get_submodule(name)
        if not isinstance(other, PackedLinear):
            certificate.differences.append(f"{name}: loaded as {type(other).__name__}")
        elif not all(map(_same, other.unpack(), _codes_and_scales(module))):
            certificate.differences.append(f"{name}: codes or scales differ after loading")
    certificate.logits = compare_logits(reference, loaded, inputs, _tolerance(checkpoint, loaded))
    if not certificate.logits.ok:
        certificate.differences.append(f"logits differ: {certificate.logits}")


def _tolerance(checkpoint: Checkpoint, loaded: Any) -> float:
    """By the coarser of two dtypes: that of the dense tensors on disk, and that it runs in."""
    dense = (info for name, info in checkpoint.tensors.items() if not name.endswith(_QUANTIZED))
    dtypes = {loaded.dtype, *(DTYPES.get(info.dtype) for info in dense)}
    return max(_TOLERANCES.get(dtype, 0.0) for dtype in dtypes)


def _refuse_pickles(directory: Path) -> None:
    if pickles := sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES):
        raise ValueError(f"verify: dst must hold no pickles, got {pickles[0]}")
