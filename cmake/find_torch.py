"""Prints `directory;version` of the torch to compile against, without importing it.

`find_package(Torch)` needs CUDA libraries whenever torch was built with CUDA and refuses CUDA
sources whenever it was not; the stable ABI needs the headers and libtorch.so alone, so both are
found by path.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import sysconfig
from pathlib import Path


def torch_directory() -> Path | None:
    """Directory of the installed torch package; build isolation hides it from import only."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    return next((c for c in candidates if (c / "include/torch/csrc/stable").is_dir()), None)


if __name__ == "__main__":
    found = torch_directory()
    if found is None:
        sys.exit("torch 2.11 or later was not found: pip install torch")
    print(f"{found};{runpy.run_path(str(found / 'version.py'))['__version__']}", end="")
