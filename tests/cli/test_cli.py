"""The command itself: what it lists, what it loads, how it tells of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from grace.cli import command_names, main


def run(*arguments: Any) -> int:
    """Exit code of `grace ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def told(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("grace: ")
    return lines[0]


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom grace.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("info", "quickstart", "train", "evaluate", "generate", "study"):
        assert name in done.stdout


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture) -> None:
    assert run(name, "--help") == 0
    assert len(capsys.readouterr().out) > 100


def test_no_command_shows_help(capsys: pytest.CaptureFixture) -> None:
    assert run() == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["info", "--nope"], "No such option"),
        (["train"], "Missing argument"),
        (["study"], "Missing command"),
        (["train", "absent.yaml"], "config must be a file, got absent.yaml"),
        (["evaluate", "absent", "."], "must be"),
        (["study", "report", "absent"], "needs a study.json"),
        (["generate", "absent", "--prompt", "?", "--image", "absent.png"], "absent.png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(*arguments) == 2
    assert message in told(capsys)


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def build() -> typer.Typer:
        app = typer.Typer()

        @app.command()
        def fail() -> None:
            raise error

        @app.command()
        def rest() -> None:
            """Beside `fail`, so that its name has to be given."""

        return app

    monkeypatch.setattr("grace.cli.build_app", build)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRACE_DEBUG", raising=False)
    _failing(monkeypatch, ValueError("a\n  long   story"))
    assert run("fail") == 2
    monkeypatch.setenv("GRACE_DEBUG", "1")
    with pytest.raises(ValueError, match="long"):
        main(["fail"])


def test_a_long_message_is_made_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("GRACE_DEBUG", raising=False)
    _failing(monkeypatch, OSError("a\n  long   story " + "x" * 1000))
    assert run("fail") == 2
    line = told(capsys)
    assert line.startswith("grace: a long story xxx")
    assert len(line) < 520


def test_a_fault_of_the_program_is_not_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["fail"])


def test_info_names_a_kernel_for_every_op_and_device(capsys: pytest.CaptureFixture) -> None:
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"cka", "dequant_gemm", "fake_quant", "gated_dkd", "linear_gated_dkd"} <= set(
        facts["ops"]
    )
    for kernels in facts["ops"].values():
        assert set(kernels) == {"cpu", "cuda"}
        assert set(kernels.values()) <= {"compiled", "reference", "composed"}
    assert facts["versions"]["torch"]
    assert run("info") == 0
    assert "linear_gated_dkd" in capsys.readouterr().out


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    from grace.evaluation import synthetic

    synthetic.draw(tmp_path / "mme", images_per_subtask=2, seed=3)
    return tmp_path / "mme"


def test_evaluate_writes_official_results_and_scores(
    models: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from grace.evaluation import mme

    out = tmp_path / "out"
    options = ("--out", out, "--max-new-tokens", 2, "--device", "cpu", "--prompt", "plain")
    assert run("evaluate", models / "student", drawn, *options) == 0
    rows = mme.read_results(out)
    assert len(rows) == 24
    scores = json.loads((out / "scores.json").read_text())
    assert scores["prompt"] == "plain"
    assert scores["total"] == mme.score(rows)["total"]
    assert "perception" in capsys.readouterr().out


def test_evaluate_says_the_same_without_graphs(
    models: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grace.generation import Generator

    made, results = [], []
    init = Generator.__init__
    monkeypatch.setattr(Generator, "__init__", lambda *a, **k: (made.append(1), init(*a, **k))[1])
    for choice in ("--graphs", "--no-graphs"):
        out = tmp_path / choice
        options = ("--out", out, "--max-new-tokens", 5, "--device", "cpu", choice)
        assert run("evaluate", models / "student", drawn, *options) == 0
        results.append({file.name: file.read_text() for file in sorted(out.iterdir())})
        assert made == [1]  # one for all batches, and none without
    assert results[0] == results[1]


def test_evaluate_pope_goes_on_where_it_stopped(
    models: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grace.evaluation import answer, suites

    (tmp_path / "images").symlink_to(drawn / "count", target_is_directory=True)
    lines = [
        json.dumps({"image": "000.png", "text": f"Is there a {thing} ?", "label": "no"})
        for thing in ("circle", "heart", "ring")
    ]
    (tmp_path / "my_pope_random.json").write_text("\n".join(lines * 13))
    options = ("--suite", "pope", "--out", tmp_path / "out", "--batch-size", 1)
    options = (*options, "--device", "cpu", "--max-new-tokens", 1)
    asked, whole = [], answer.answer

    def stopped(network, processor, rows, **settings):
        asked.append(len(rows))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(network, processor, rows, **settings)

    monkeypatch.setattr(answer, "answer", stopped)
    assert run("evaluate", models / "student", tmp_path, *options) == 130
    assert (tmp_path / "out" / "answers.part.jsonl").is_file()
    assert run("evaluate", models / "student", tmp_path, *options) == 0
    assert asked == [32, 7, 7]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["settings"]["random"]["questions"] == 39
    replies = (tmp_path / "out" / "replies.jsonl").read_text().splitlines()
    rows = suites.suite_named("pope").load(tmp_path, None, "")
    assert [json.loads(line)["question"] for line in replies] == [row.question for row in rows]
    assert not (tmp_path / "out" / "answers.part.jsonl").exists()


def test_generate_streams_and_tells_its_speed(
    models: Path, drawn: Path, capsys: pytest.CaptureFixture
) -> None:
    image = drawn / "count" / "000.png"
    options = ("--image", image, "--prompt", "How many stars ?", "--max-new-tokens", 3)
    assert run("generate", models / "student", *options, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "3 tokens, " in captured.err
    assert " tokens/s (" in captured.err
    assert ", prefill " in captured.err


def test_generate_samples_from_a_seed(models: Path, capsys: pytest.CaptureFixture) -> None:
    said = []
    for seed in (1, 1, 2):
        options = ("--prompt", "How many stars ?", "--temperature", 3, "--seed", seed)
        run("generate", models / "student", *options, "--max-new-tokens", 8, "--device", "cpu")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert run("generate", models / "student", "--prompt", "?", "--lm-head-bits", 4) == 2
    assert "lm_head_bits must be 8, got 4" in capsys.readouterr().err


def test_packed_models_are_fused_for_serving(
    models: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import grace
    from grace.models import load_model
    from grace.nn import FusedLinear, PackedLinear

    model, processor = load_model(str(models / "student"), device="cpu")
    grace.quantize(model, group_size=-1)
    grace.pack(model)
    model.save_pretrained(tmp_path / "packed")
    processor.save_pretrained(tmp_path / "packed")
    for fuse in (True, False):
        loaded, _ = load_model(str(tmp_path / "packed"), device="cpu", fuse=fuse)
        assert any(isinstance(module, PackedLinear) for module in loaded.modules())
        assert any(isinstance(module, FusedLinear) for module in loaded.modules()) == fuse
    image = drawn / "count" / "000.png"
    options = ("--image", image, "--prompt", "How many stars ?", "--max-new-tokens", 3)
    said = []
    for choice in ("--fuse", "--no-fuse"):
        assert run("generate", tmp_path / "packed", *options, "--device", "cpu", choice) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("damage", ["truncated", "config", "missing"])
def test_a_damaged_checkpoint_is_one_line(
    models: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    import shutil

    broken = shutil.copytree(models / "student", tmp_path / "broken")
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "config":
        (broken / "config.json").write_text("{")
    else:
        weights.unlink()
    capsys.readouterr()
    assert run("evaluate", broken, drawn, "--out", tmp_path / "out") == 2
    assert "checkpoint: " in told(capsys)
    assert not (tmp_path / "out").exists()


def test_devices_and_dtypes_that_are_not_there(
    models: Path, drawn: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert run("evaluate", models / "student", drawn, "--dtype", "int8") == 2
    assert "dtype must be one of" in told(capsys)
    assert run("evaluate", models / "student", drawn, "--device", "abacus") == 2
    assert "device must be" in told(capsys)
    assert run("evaluate", models / "student", drawn, "--prompt", "odd") == 2
    assert "variant must be one of" in told(capsys)
