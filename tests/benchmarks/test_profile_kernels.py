"""The profile of an op's kernels: names, shares, the table."""

from __future__ import annotations

import pytest

from benchmarks.profile_kernels import shares, short_name, table


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (
            "void grace::cka::warpgroup::gram_kernel<(bool)1>(grace::cka::warpgroup::Maps, int)",
            "warpgroup::gram_kernel<true>",
        ),
        (
            "void grace::cka::warpgroup::gram_kernel<true>(grace::cka::warpgroup::Maps)",
            "warpgroup::gram_kernel<true>",
        ),
        (
            "grace::cka::(anonymous namespace)::value_kernel(grace::cka::GramArguments)",
            "cka::value_kernel",
        ),
        (
            "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
            "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        ),
        ("Memset (Device)", "Memset"),
    ],
)
def test_names(kernel: str, name: str) -> None:
    assert short_name(kernel) == name


def test_shares_and_table() -> None:
    events = [("void grace::a::x(int)", 3.0), ("void grace::a::y<true>(int)", 1.0)] * 2
    events += [("void grace::a::y<true>(int)", 4.0)] * 2
    rows = shares(events, calls=2)
    assert [(row["kernel"], row["launches"], row["us_a_call"]) for row in rows] == [
        ("a::x", 1.0, 3.0),
        ("a::y<true>", 2.0, 5.0),
    ]
    assert rows[1]["us"] == 2.5
    text = table({"rows": [{"size": {"n": 4}, **row} for row in rows]})
    assert text.splitlines()[-1] == "| n=4 | 3.0 | 5.0 (2) | 8 |"
    other = [{"size": {"n": 5}, **rows[0]}]
    text = table({"rows": [*({"size": {"n": 4}, **row} for row in rows), *other]})
    assert text.splitlines()[-1] == "| n=5 | 3.0 | – | 3 |"
