"""`grace chat`: what is remembered, what is told, what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from grace.cli import build_app


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 56), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts as the chat template made them, of every turn."""
    from grace.cli import _serving

    kept: list[str] = []
    inputs_of = _serving.inputs_of

    def spied(model: Any, processor: Any, messages: Any, pictures: Any) -> Any:
        inputs = inputs_of(model, processor, messages, pictures)
        kept.append(processor.tokenizer.decode(inputs["input_ids"][0]))
        return inputs

    monkeypatch.setattr(_serving, "inputs_of", spied)
    return kept


def talk(models: Path, lines: list[str], *options: Any) -> Result:
    arguments = ["chat", models / "student", "--device", "cpu", "--max-new-tokens", 3, *options]
    text = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(build_app(), [str(a) for a in arguments], input=text)


def test_turns_are_remembered_until_reset(models: Path, picture: Path, asked: list[str]) -> None:
    lines = ["How many stars ?", f"/image {picture}", "Is there a red star ?", "/reset", "What ?"]
    done = talk(models, [*lines, "/quit", "not heard"], "--image", picture)
    assert done.exit_code == 0, done.output
    assert len(asked) == 3
    first, second, third = asked
    assert second.startswith(first)  # with the answer and the next question behind it
    assert third.count("What") == 1
    assert "stars" not in third
    image = "<image>" if "<image>" in first else "<|image_pad|>"
    assert second.count(image) == 2 * first.count(image) > 0
    assert image not in third
    assert done.output.count(" tokens, ") == 3


def test_the_end_of_input_ends_it(models: Path) -> None:
    assert talk(models, []).exit_code == 0


def test_what_is_not_understood_or_not_there_is_told(models: Path, asked: list[str]) -> None:
    done = talk(models, ["/help", "", "/image absent.png", "/image pyproject.toml"])
    assert done.exit_code == 0
    assert done.output.count("/image PATH adds") == 2  # at the start and when asked
    assert "absent.png: No such file" in done.output
    assert "image must be a picture, got pyproject.toml" in done.output
    assert asked == []


def test_a_turn_that_does_not_fit_is_not_remembered(models: Path, asked: list[str]) -> None:
    long = "Is there a red star ? " * 12
    done = talk(models, ["How many ?", long, "How many ?"], "--max-length", 40)
    assert done.exit_code == 0, done.output
    assert "this turn does not fit" in done.output
    assert "there is room for 40, answers included" in done.output
    assert asked[2].count("red") == 0
    assert asked[2].startswith(asked[0])


def test_an_answer_that_is_stopped_is_remembered(
    models: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grace.generation import Generator

    calls = []
    generate = Generator.generate

    def stopped(self: Generator, streamer: Any = None, **rest: Any) -> Any:
        calls.append(rest)
        if len(calls) > 1:
            return generate(self, streamer=streamer, **rest)
        streamer.put(rest["input_ids"])
        streamer.put(torch.tensor([5]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "generate", stopped)
    done = talk(models, ["How many stars ?", "And now ?"])
    assert done.exit_code == 0, done.output
    assert "(stopped)" in done.output
    assert asked[1].startswith(asked[0])
    assert len(calls) == 2


def test_bad_input_ends_before_it_begins(models: Path) -> None:
    from grace.cli._errors import bad_input

    done = talk(models, [], "--image", "absent.png")
    assert bad_input(done.exception)
    done = CliRunner().invoke(build_app(), ["chat", "absent"])
    assert bad_input(done.exception)
    assert talk(models, [], "--max-new-tokens", 0).exit_code == 2
