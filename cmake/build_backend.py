"""PEP 517 backend: scikit-build-core's setuptools plugin, plus torch when its headers are missing.

The extension is compiled against the headers of the torch it will run with. Under pip's build
isolation that torch is still found on disk (`cmake/find_torch.py`); only where the environment has
none does the isolated build ask for one, the oldest release that the extension supports.
"""

from __future__ import annotations

import find_torch
from scikit_build_core.setuptools import build_meta as _plugin
from scikit_build_core.setuptools.build_meta import *  # noqa: F403

_OLDEST_TORCH = "torch==2.11.0"


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103 (PEP 517 hook)
    return _plugin.get_requires_for_build_wheel(config_settings) + _missing_torch()


def get_requires_for_build_editable(config_settings=None):  # noqa: D103 (PEP 517 hook)
    return _plugin.get_requires_for_build_editable(config_settings) + _missing_torch()


def _missing_torch() -> list[str]:
    return [] if find_torch.torch_directory() else [_OLDEST_TORCH]
