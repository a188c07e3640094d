"""The data section of a configuration, and what it builds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grace.training import Collator, ConversationDataset, GraceConfig
from grace.training.collator import PackedCollator
from grace.training.data_config import build_collator, build_dataset, parse_data
from grace.training.sequence_packing import PackedDataset


@pytest.fixture
def rows_file(rows_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(rows_root, tmp_path / "data")
    return tmp_path / "data" / "train.json"


def test_one_file_or_several(rows_file: Path) -> None:
    path = str(rows_file)
    assert [file.path for file in parse_data(path).files] == [path]
    assert parse_data({"path": path, "image_root": "x"}).image_root == "x"
    several = parse_data({"path": [path, {"path": path, "weight": 2, "image_root": "y"}]})
    assert [(file.weight, file.image_root) for file in several.files] == [(1.0, None), (2, "y")]
    assert parse_data({"path": path, "pack_length": 512}).longest == 512
    assert parse_data({"path": path, "pack_length": 512, "max_length": 64}).longest == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data must be a path or a mapping with a path, got None"),
        ({"path": []}, "data must be a path or a mapping with a path"),
        ({"paht": "x", "path": "P"}, r"unknown option data.paht, did you mean 'path'"),
        ({"path": {"file": "P"}}, "data.path must be a path or a mapping"),
        ({"path": {"path": "P", "wieght": 2}}, "unknown option data.path.wieght, did you mean 'we"),
        ({"path": {"path": "P", "weight": 0}}, "data.path.weight must be > 0, got 0"),
        ({"path": "P", "on_error": "ignore"}, "data.on_error must be one of"),
        ({"path": "P", "max_length": 0}, "data.max_length must be > 0 or null, got 0"),
        ({"path": "P", "pack_length": 1.5}, "data.pack_length must be > 0 or null, got 1.5"),
        ({"path": "P", "pack_length": 5, "max_length": 6}, "max_length must be <= pack_length 5"),
        ({"path": "P", "truncate": True}, "data.truncate must have max_length"),
        ({"path": "P", "check_files": "no"}, "data.check_files must be true or false"),
    ],
)
def test_values_that_do_not_fit(rows_file: Path, options: dict, message: str) -> None:
    filled = json.loads(json.dumps(options).replace('"P"', json.dumps(str(rows_file))))
    with pytest.raises(ValueError, match=message):
        parse_data(filled)


def test_a_file_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path must be a file, got absent\.json"):
        parse_data("absent.json")


def _build(options: dict, processor: Any, tmp_path: Path, **training: Any) -> Any:
    config = GraceConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **training)
    return build_dataset(parse_data(options), config, processor)


def test_what_is_built(rows_file: Path, processor: Any, tmp_path: Path, make_student: Any) -> None:
    plain = {"path": str(rows_file)}
    dataset = _build(plain, processor, tmp_path)
    assert isinstance(dataset, ConversationDataset)
    assert len(dataset) == 48
    assert type(build_collator(parse_data(plain), processor, None)) is Collator
    packed = {**plain, "pack_length": 100, "cache_dir": str(tmp_path / "cache")}
    made = _build(packed, processor, tmp_path)
    assert isinstance(made, PackedDataset)
    assert (made.capacity, made.dataset.max_length) == (100, 100)
    assert list((tmp_path / "cache").iterdir())
    student = make_student()
    collator = build_collator(parse_data(packed), processor, student)
    assert isinstance(collator, PackedCollator)
    assert not collator.flatten
    student.config._attn_implementation = "flash_attention_2"
    assert build_collator(parse_data(packed), processor, student).flatten


def test_weights_and_roots_of_several_files(
    rows_file: Path, processor: Any, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in json.loads(rows_file.read_text())))
    options = {
        "path": [
            {"path": str(rows_file), "weight": 0.25},
            {"path": str(lines), "weight": 1.5, "image_root": str(rows_file.parent)},
        ]
    }
    dataset = _build(options, processor, tmp_path)
    first, second = (dataset.entries < 48).sum(), (dataset.entries >= 48).sum()
    assert (first, second) == (12, 72)
    assert set(dataset.entries[12:].tolist()) == set(range(48, 96))
    assert dataset.where(0) == f"{rows_file}, row 0"
    assert dataset.where(50) == f"{lines}, row 2"
    item = dataset[12]
    assert item["row_ids"] == 48
    again, other = (
        _build(options, processor, tmp_path, seed=seed).fingerprint for seed in (42, 43)
    )
    assert again == dataset.fingerprint
    assert other != again


def test_a_bad_row_of_a_file_is_named(rows_file: Path, processor: Any, tmp_path: Path) -> None:
    rows = json.loads(rows_file.read_text())
    rows[5]["conversations"].pop()
    rows[9]["image"] = "absent.png"
    rows_file.write_text(json.dumps(rows))
    with pytest.raises(
        ValueError, match=r"train\.json, row 5 must be usable, got: a row must have"
    ):
        _build({"path": str(rows_file)}, processor, tmp_path)
    del rows[5]
    rows_file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"row 8 must be usable, got: no file .*absent\.png"):
        _build({"path": str(rows_file)}, processor, tmp_path)
    late = _build({"path": str(rows_file), "check_files": False}, processor, tmp_path)
    with pytest.raises(ValueError, match=r"row 8 must be usable, got: no image .*absent\.png"):
        late[8]
