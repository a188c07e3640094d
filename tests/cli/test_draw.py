"""`grace draw` refuses what would spoil a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace.cli import main


def test_held_out_compositions_are_no_training_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["draw", "rows", str(tmp_path / "x"), "--images", "2", "--split", "heldout"])
    assert ended.value.code == 2
    assert "--split must be train or validation, got 'heldout'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
