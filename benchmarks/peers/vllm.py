"""vLLM's Marlin and Machete, out of its wheel and without installing it.

``GRACE_BENCH_VLLM`` names the file ``_C.abi3.so`` of a vLLM wheel that fits the installed torch;
``scalar_type.py`` of the same wheel lies beside it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.gptq import pack_gptq
from benchmarks.peers.peer import Peer, Product

VARIABLE = "GRACE_BENCH_VLLM"
GROUP = 128


@functools.cache
def why_absent() -> str:
    """Empty where the library is there and loads."""
    path = os.environ.get(VARIABLE, "")
    if not path:
        return f"vLLM: {VARIABLE} is not set"
    if not torch.cuda.is_available():
        return "vLLM: needs a GPU"
    try:
        torch.ops.load_library(path)
        _uint4b8()
    except (OSError, ImportError, AttributeError, RuntimeError) as error:
        return f"vLLM: {str(error).splitlines()[0][:200]}"
    return ""


@functools.cache
def _uint4b8() -> int:
    """vLLM's number for codes stored with 8 added."""
    path = Path(os.environ[VARIABLE]).with_name("scalar_type.py")
    spec = importlib.util.spec_from_file_location("grace_bench_vllm_scalar_type", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module.scalar_types.uint4b8.id


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Marlin's locks: zero before and after every call."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(count, dtype=torch.int32, device=device)


def _marlin_scales(scales: Tensor) -> Tensor:
    """[N, G] as [G, N] with every 64 columns in the order in which a warp's lanes hold them."""
    order = [i + 8 * j for i in range(8) for j in range(8)]
    turned = scales.t().contiguous()
    return turned.view(-1, 64)[:, order].reshape(turned.shape).contiguous()


def prepare_marlin(codes: Tensor, scales: Tensor) -> Product:
    """gptq_marlin_repack once, then marlin_gemm with sums in fp32."""
    (n, k), device, ops = codes.shape, codes.device, torch.ops._C
    empty = torch.empty(0, dtype=torch.int32, device=device)
    weight = ops.gptq_marlin_repack(pack_gptq(codes), empty, k, n, 4, False)
    ordered, locks, kind = _marlin_scales(scales), _workspace(device), _uint4b8()

    def product(x: Tensor) -> Tensor:
        return ops.marlin_gemm(
            x,
            None,  # out
            weight,
            None,  # bias
            ordered,
            None,  # scales of x
            None,  # a scale of all
            None,  # zeros
            empty,  # order of groups
            empty,  # permutation
            locks,
            kind,
            x.shape[0],
            n,
            k,
            True,  # all of K is here
            False,  # no atomic additions
            True,  # fp32 sums
            False,  # zeros are not floating
        )

    return product


def prepare_machete(codes: Tensor, scales: Tensor) -> Product:
    """machete_prepack_B once, then machete_mm with the schedule that it chooses."""
    ops, kind, dtype = torch.ops._C, _uint4b8(), scales.dtype
    columns_first = pack_gptq(codes).t().contiguous().t()
    weight = ops.machete_prepack_B(columns_first, dtype, kind, dtype)
    turned = scales.t().contiguous()

    def product(x: Tensor) -> Tensor:
        return ops.machete_mm(x, weight, kind, None, turned, None, GROUP, None, None, None)

    return product


def _why_not_machete() -> str:
    if (absent := why_absent()) != "":
        return absent
    return "" if torch.cuda.get_device_capability()[0] == 9 else "machete: needs sm_90"


MARLIN = Peer("marlin", prepare_marlin, why_absent)
MACHETE = Peer("machete", prepare_machete, _why_not_machete)
