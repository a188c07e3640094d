"""Puts committed results into README.md: ``python tools/readme.py`` (``--check`` only compares).

Numbers in the README stand between markers and come from ``studies/quickstart/study.json`` and
``benchmarks/results``; nothing there is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import table as benchmark_table  # noqa: E402
from grace.study.report import footnotes, read_study, table  # noqa: E402

STUDY = ROOT / "studies/quickstart"


def quickstart() -> str:
    """Table, what stands behind it, and chart of the committed quickstart."""
    study = read_study(STUDY)
    header, rows = table(study)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    notes = [f"<sub>{note}</sub>\n" for note in footnotes(study)]
    chart = "![Score of every method at 4 and 2 bits](studies/quickstart/scores.png)"
    return "\n".join([*shown, "", *notes, chart])


def dequant_gemm() -> str:
    """The CPU results of dequant_gemm, with the machine they come from."""
    parts = []
    for path in sorted((ROOT / "benchmarks/results").glob("cpu-*/dequant_gemm.json")):
        content = json.loads(path.read_text())
        facts = content["environment"]
        head = (
            f"`dequant_gemm`, W4, group 128, µs (medians), {facts['device']}, "
            f"threads: {facts['threads']}, torch {facts['torch']}:"
        )
        parts += [head, "", benchmark_table(content)]
    return "\n".join(parts)


def filled(text: str) -> str:
    """The README with every marked block made anew."""
    for make in (quickstart, dequant_gemm):
        name = make.__name__
        pattern = rf"(<!-- begin {name} .*?-->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(
            pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"readme: README.md must have one block {name}, got {count}")
    return text


def main() -> int:
    """Writes the README, or says with exit code 1 that it is not what the results give."""
    path = ROOT / "README.md"
    new = filled(path.read_text())
    if "--check" in sys.argv[1:]:
        if new != path.read_text():
            print("README.md is not what the committed results give: python tools/readme.py")
            return 1
        return 0
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
