"""Pages under ``docs`` whose block ``measured`` and charts are made from committed results.

    <!-- begin measured (COMMAND) -->
    …
    <!-- end measured -->

A chart carries a digest of the numbers that it was drawn from, so that a check need not draw.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- begin measured .*?-->\n).*?(<!-- end measured -->)", flags=re.DOTALL)


@dataclass(frozen=True)
class Chart:
    """A PNG beside a page: `numbers` is everything that it shows, `draw` makes a Figure."""

    path: Path
    numbers: Any
    draw: Callable[[], Any]

    @property
    def digest(self) -> str:
        """Of the numbers."""
        return hashlib.sha256(json.dumps(self.numbers).encode()).hexdigest()[:16]

    @property
    def current(self) -> bool:
        """Whether the file was drawn from these numbers."""
        return drawn_from(self.path) == self.digest

    def write(self) -> None:
        """Draws it, unless it is current."""
        if not self.current:
            self.path.write_bytes(png(self.draw(), self.digest))


def gpu_results(name: str) -> dict[str, dict[str, Any]]:
    """GPU → committed result of a benchmark."""
    paths = sorted(results.ROOT.glob(f"*/{name}.json"))
    gpus = [path for path in paths if not path.parent.name.startswith("cpu-")]
    return {path.parent.name: json.loads(path.read_text()) for path in gpus}


def heading(facts: Mapping[str, Any]) -> str:
    """A section's title and the machine, from a result's `environment`."""
    return (
        f"### {facts['device'].upper()}\n\n"
        f"torch {facts['torch']}, CUDA {facts.get('cuda', 'unknown')}, driver "
        f"{facts.get('driver', 'unknown')}, commit {facts['commit'][:12]}."
    )


def has_block(page: Path) -> bool:
    """Whether a page has the block."""
    return _BLOCK.search(page.read_text()) is not None


def filled(page: Path, measured: str) -> str:
    """The page's text with its block made anew.

    Raises:
        ValueError: it does not have exactly one.
    """
    text, count = _BLOCK.subn(lambda m: f"{m[1]}{measured}\n{m[2]}", page.read_text())
    if count != 1:
        raise ValueError(f"plot: {page.name} must have one block measured, got {count}")
    return text


def update(page: Path, measured: str, charts: list[Chart], *, check: bool) -> list[str]:
    """Writes a page and its charts; with `check`, names those that are not what they would be."""
    text = filled(page, measured)
    if check:
        names = [page.name] if text != page.read_text() else []
        return names + [chart.path.name for chart in charts if not chart.current]
    for chart in charts:
        chart.write()
    results.write_whole(page, text)
    return []


def png(figure: Any, digest: str) -> bytes:
    """Few colors and the digest: a small file that says what it was drawn from."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, small, info = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(drawn)
    info.add_text("data", digest)
    image = Image.open(drawn).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
    image.save(small, "PNG", optimize=True, pnginfo=info)
    return small.getvalue()


def drawn_from(path: Path) -> str:
    """The digest that a chart carries; empty where there is none."""
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get("data", ""))
