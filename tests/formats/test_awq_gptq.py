"""AWQ and GPTQ on disk, against an unpacking that takes one number at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import unpacked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.formats import awq, gptq
from grace.formats.compressed_tensors import Scheme
from grace.formats.compressed_tensors_config import Unsupported
from grace.formats.ignored import patterns, substrings

DATA = Path(__file__).parents[1] / "data"


def random_layer(
    rows: int, groups: int, scheme: Scheme, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    low = -(2 ** (scheme.bits - 1))
    columns = groups * (scheme.group_size if scheme.group_size > 0 else 32)
    codes = torch.randint(low, -low, (rows, columns), dtype=torch.int8)
    return codes, (torch.rand(rows, groups) * 0.1 + 1e-3).to(dtype)


@settings(max_examples=25, deadline=None)
@given(eights=st.integers(1, 3), groups=st.integers(1, 3), size=st.sampled_from([1, 8, 24, 32]))
def test_awq_is_codes_less_zeros(eights: int, groups: int, size: int):
    scheme = Scheme(4, size)
    codes, scales = random_layer(8 * eights, groups, scheme)
    tensors = awq.encode(codes, scales, scheme, "layer")
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == {
        "qweight": (torch.int32, (groups * size, eights)),
        "qzeros": (torch.int32, (groups, eights)),
        "scales": (torch.float16, (groups, 8 * eights)),
    }
    assert unpacked.awq(tensors) == (codes.tolist(), scales.tolist())
    back, same = awq.decode(tensors, scheme, "layer")
    assert torch.equal(back, codes)
    assert torch.equal(same.double(), scales.double())


@settings(max_examples=25, deadline=None)
@given(
    eights=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 24, 32]),
    bits=st.sampled_from([4, 8]),
)
def test_gptq_is_codes_less_zeros(eights: int, groups: int, size: int, bits: int):
    scheme = Scheme(bits, size)
    codes, scales = random_layer(8 * eights, groups, scheme)
    tensors = gptq.encode(codes, scales, scheme, "layer")
    columns = groups * size
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == {
        "qweight": (torch.int32, (columns * bits // 32, 8 * eights)),
        "qzeros": (torch.int32, (groups, 8 * eights * bits // 32)),
        "scales": (torch.float16, (groups, 8 * eights)),
        "g_idx": (torch.int32, (columns,)),
    }
    assert tensors["g_idx"].tolist() == [k // size for k in range(columns)]
    assert unpacked.gptq(tensors, bits) == (codes.tolist(), scales.tolist())
    config = gptq.read_config({"bits": bits, "group_size": size, "sym": True})
    back, same = gptq.decode(tensors, config, "layer")
    assert torch.equal(back, codes)
    assert torch.equal(same.double(), scales.double())


def test_words_in_full():
    """One word of each, written out by hand."""
    codes = torch.tensor([[-8], [-7], [-6], [-5], [-4], [-3], [-2], [-1]], dtype=torch.int8)
    words = awq.encode(codes, torch.ones(8, 1), Scheme(4, 1), "layer")
    assert words["qweight"].item() == 0x75316420
    assert words["qzeros"].item() & 0xFFFFFFFF == 0x88888888
    eight = codes.t().expand(8, 8).contiguous()
    words = gptq.encode(eight, torch.ones(8, 1), Scheme(4, -1), "layer")
    assert words["qweight"].tolist() == [[0x76543210] * 8]
    assert words["qzeros"].tolist() == [[0x77777777]]
    words = gptq.encode(eight, torch.ones(8, 1), Scheme(8, 8), "layer")
    assert words["qzeros"].tolist() == [[0x7F7F7F7F] * 2]


def test_the_second_version_of_gptq_is_read():
    scheme = Scheme(4, 32)
    codes, scales = random_layer(8, 2, scheme)
    tensors = gptq.encode(codes, scales, scheme, "layer")
    tensors["qzeros"] = tensors["qzeros"] + 0x11111111
    del tensors["g_idx"]
    config = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    assert torch.equal(gptq.decode(tensors, gptq.read_config(config), "layer")[0], codes)
    with pytest.raises(Unsupported, match=r"zero points of layer must all be 7 \(symmetric\)"):
        gptq.decode(tensors, gptq.read_config({"bits": 4, "group_size": 32}), "layer")


def test_the_authors_awq_is_their_codes():
    """A layer that their implementation packed, beside the weight that it packed."""
    with np.load(DATA / "published_layer.npz") as data:
        layer = {key: torch.from_numpy(data[key]) for key in data.files}
    weight = layer.pop("weight_bf16").view(torch.bfloat16)
    scales = layer.pop("log_scale").double().exp().float().view(weight.shape[0], -1)
    codes, halves = awq.decode(layer, Scheme(4, 128), "layer")
    product = codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
    assert torch.equal(product.flatten(1).to(torch.bfloat16), weight)
    assert torch.equal(halves, scales.half())
    again = awq.encode(codes, halves, Scheme(4, 128), "layer")
    assert all(torch.equal(again[key], layer[key]) for key in layer)


@pytest.mark.parametrize(
    ("scale", "exact"),
    [
        (2.0**-17, True),
        (255 * 2.0**-24, True),
        (257 * 2.0**-26, False),
        (65280.0, True),
        (1e5, False),
    ],
)
def test_scales_are_never_rounded(scale: float, exact: bool):
    scales = torch.full((8, 1), scale, dtype=torch.float32)
    codes = torch.ones(8, 8, dtype=torch.int8)
    for layout in (awq, gptq):
        if exact:
            tensors = layout.encode(codes, scales, Scheme(4, -1), "layer")
            assert tensors["scales"].tolist() == [[scale] * 8]
            continue
        with pytest.raises(ValueError, match=r"scales of layer must be exact in float16.*8 of 8"):
            layout.encode(codes, scales, Scheme(4, -1), "layer")


def changed_awq(**change: Any) -> dict[str, Tensor]:
    scheme = Scheme(4, 32)
    return {**awq.encode(*random_layer(16, 2, scheme), scheme, "layer"), **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, r"must all be 8 \(symmetric\)"),
        ({"scales": torch.ones(4, 16)}, r"layer.scales must be \[2, 16\], got \[4, 16\]"),
        ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "scales must be floating"),
        ({"qweight": torch.ones(64, 2)}, "qweight must be int32, got torch.float32"),
        ({"qweight": torch.ones(60, 2, dtype=torch.int32)}, "inputs that its group size divides"),
    ],
)
def test_awq_that_does_not_fit_is_refused(change: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        awq.decode(changed_awq(**change), Scheme(4, 32), "layer")


def test_act_order_is_refused():
    scheme = Scheme(4, 32)
    tensors = gptq.encode(*random_layer(8, 2, scheme), scheme, "layer")
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    config = gptq.read_config({"bits": 4, "group_size": 32, "desc_act": True})
    with pytest.raises(Unsupported, match="g_idx of layer must be k // group_size"):
        gptq.decode(tensors, config, "layer")
    del tensors["g_idx"]
    with pytest.raises(ValueError, match=r"layer.g_idx must be there, got no such tensor"):
        gptq.decode(tensors, config, "layer")


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (awq.read_config, {"bits": 4, "group_size": 32, "version": "gemv"}, "version must be gemm"),
        (awq.read_config, {"bits": 8, "group_size": 32}, "awq: bits must be 4, got 8"),
        (awq.read_config, {"bits": 4}, "awq: group_size must be -1 or positive, got None"),
        (gptq.read_config, {"bits": 4, "group_size": 32, "sym": False}, "sym must be true"),
        (gptq.read_config, {"bits": 3, "group_size": 32}, "gptq: bits must be 4 or 8, got 3"),
        (gptq.read_config, {"bits": 4, "group_size": 0}, "gptq: group_size must be -1 or positive"),
        (
            gptq.read_config,
            {"bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "checkpoint_format must be gptq or gptq_v2, got marlin",
        ),
        (
            gptq.read_config,
            {"bits": 4, "group_size": 32, "dynamic": {"-:.*a": {}, "+:.*b": {"bits": 8}}},
            r"dynamic must only skip modules \(-:\), got \+:.\*b",
        ),
    ],
)
def test_configs_we_do_not_run_are_unsupported(read: Any, config: dict, message: str):
    with pytest.raises(Unsupported, match=message):
        read(config)


W4, W8 = Scheme(4, 32), Scheme(8, 32)


@pytest.mark.parametrize("layout", [awq, gptq])
def test_one_scheme_for_all(layout: Any):
    with pytest.raises(ValueError, match="must be there and share bits and group size, got Scheme"):
        layout.make_config({"a.o_proj": W4, "b.o_proj": W8}, [])
    with pytest.raises(ValueError, match=r"share bits and group size, got none"):
        layout.make_config({}, ["lm_head"])
    with pytest.raises(ValueError, match=rf"{layout.METHOD}: q_proj, k_proj, v_proj must share"):
        layout.make_config({"a.q_proj": W4}, ["a.k_proj"])


def test_layer_1_is_told_from_layer_11():
    names = [f"model.layers.{i}.mlp.{part}" for i in range(12) for part in ("gate_proj", "up_proj")]
    dense = [name for name in names if ".1." in name]
    spared = [name for name in names if name not in dense]
    for entry in substrings(dense, spared):
        assert not any(entry in name for name in spared)
    assert patterns(dense, spared) == [r".*layers\.1\..*"]
    assert "model.layers.1.mlp.gate_up_proj" in substrings(dense, spared)
