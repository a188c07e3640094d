"""The tiny student dense and packed, as the two sides of the page, and a picture to ask about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from packed_models import export_tiny

import grace
from grace.demo.answering import Side, make_side
from grace.evaluation import mme, synthetic, tiny


def load(directory: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> list[Side]:
    directory = tmp_path_factory.mktemp("demo") / "packed"
    export_tiny(directory)
    packed = load(directory)
    grace.nn.fuse(packed)
    return [
        make_side("dense", load(tiny.student_dir()), tiny.make_processor()),
        make_side("packed <4 bits>", packed, tiny.make_processor()),
    ]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("demo") / "drawn"
    synthetic.draw(root, images_per_subtask=1, seed=0)
    return mme.load(root)
