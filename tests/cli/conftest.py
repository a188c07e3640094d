from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import save_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student` and `teacher`, which know nothing."""
    return save_models(tmp_path_factory.mktemp("models"))
