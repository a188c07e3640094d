"""The disk format, against the compressed-tensors package itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.formats.compressed_tensors import Scheme, decode, encode

ct = pytest.importorskip("compressed_tensors.compressors.pack_quantized")


def random_layer(
    rows: int, columns: int, scheme: Scheme, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    low = -(2 ** (scheme.bits - 1))
    codes = torch.randint(low, -low, (rows, columns), dtype=torch.int8)
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    return codes, (torch.rand(rows, groups) * 0.1 + 1e-3).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.sampled_from([1, 3, 8, 16, 32]),
    bits=st.sampled_from([4, 8]),
)
def test_words_are_those_of_compressed_tensors(rows: int, groups: int, size: int, bits: int):
    scheme = Scheme(bits, size)
    codes, scales = random_layer(rows, groups * size, scheme)
    tensors = encode(codes, scales, bits)
    assert torch.equal(tensors["weight_packed"], ct.pack_to_int32(codes, bits))
    assert tensors["weight_packed"].dtype == torch.int32
    assert tensors["weight_shape"].tolist() == [rows, groups * size]
    back, same_scales = decode(tensors, scheme, "layer")
    assert torch.equal(back, codes)
    assert torch.equal(same_scales, scales)
    unpacked = ct.unpack_from_int32(tensors["weight_packed"], bits, codes.shape)
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_its_decompression_is_codes_times_scales(bits: int, size: int, dtype: torch.dtype):
    from compressed_tensors.quantization import QuantizationScheme

    codes, scales = random_layer(24, 256, Scheme(bits, size), dtype)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    decompress = ct.PackedQuantizationCompressor.decompress
    dense = decompress(encode(codes, scales, bits), scheme)["weight"]
    expected = codes.float().view(24, scales.shape[1], -1) * scales.float().unsqueeze(-1)
    assert dense.dtype == dtype
    assert torch.equal(dense, expected.flatten(1).to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(4, 3)}, r"layer.weight_scale must be \[4, 4\].*got \[4, 3\]"),
        (
            {"weight_packed": torch.zeros(4, 7, dtype=torch.int32)},
            r"weight_packed must be \[4, 8\]",
        ),
        ({"weight_packed": torch.zeros(4, 8)}, "weight_packed must be int32, got torch.float32"),
        ({"weight_shape": torch.tensor([4, 70])}, "group size of layer must be -1 or divide 70"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str):
    scheme = Scheme(4, 16)
    tensors = encode(*random_layer(4, 64, scheme), 4)
    with pytest.raises(ValueError, match=message):
        decode({**tensors, **change}, scheme, "layer")


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        encode(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1), 3)
