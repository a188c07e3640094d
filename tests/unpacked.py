"""Codes and scales out of files' tensors, in plain Python: a number at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# AutoAWQ's order: nibble p of a word holds output ORDER[p].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(tensors: Mapping[str, Tensor]) -> tuple[list[list[int]], list[list[float]]]:
    """(codes [N][K], scales [N][G])."""
    words, zeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales = tensors["scales"].tolist()
    size, outputs = len(words) // len(scales), 8 * len(words[0])

    def field(row: list[int], output: int) -> int:
        return (row[output // 8] >> 4 * ORDER.index(output % 8)) & 15

    codes = [
        [field(row, n) - field(zeros[k // size], n) for k, row in enumerate(words)]
        for n in range(outputs)
    ]
    return codes, _transposed(scales)


def gptq(tensors: Mapping[str, Tensor], bits: int) -> tuple[list[list[int]], list[list[float]]]:
    """(codes [N][K], scales [N][G]), zero points as version 1 stores them."""
    words, zeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    groups, per_word, mask = tensors["g_idx"].tolist(), 32 // bits, 2**bits - 1

    def zero(group: int, n: int) -> int:
        return ((zeros[group][n // per_word] >> bits * (n % per_word)) & mask) + 1

    codes = [
        [
            ((words[k // per_word][n] >> bits * (k % per_word)) & mask) - zero(group, n)
            for k, group in enumerate(groups)
        ]
        for n in range(len(words[0]))
    ]
    return codes, _transposed(tensors["scales"].tolist())


def compressed(
    tensors: Mapping[str, Tensor], bits: int
) -> tuple[list[list[int]], list[list[float]]]:
    """(codes [N][K], scales [N][G])."""
    columns, per_word = tensors["weight_shape"].tolist()[1], 32 // bits
    codes = [
        [
            ((row[k // per_word] >> bits * (k % per_word)) & (2**bits - 1)) - 2 ** (bits - 1)
            for k in range(columns)
        ]
        for row in tensors["weight_packed"].tolist()
    ]
    return codes, tensors["weight_scale"].tolist()


def _transposed(rows: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]
