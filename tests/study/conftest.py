from __future__ import annotations

from pathlib import Path

import pytest

from grace.evaluation import tiny


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder with the shipped `student` and `teacher`."""
    assert tiny.student_dir().parent == tiny.teacher_dir().parent
    return tiny.student_dir().parent
