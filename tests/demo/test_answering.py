"""Answers as they come: their text is the model's, their figures what the clock says."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image

from grace.demo import answering
from grace.demo.answering import Answer, Side, answer, weight_bytes
from grace.demo.cards import card, problem, size
from grace.evaluation.answer import answer as answer_rows


def opened(row: Any) -> Image.Image:
    with Image.open(row.image) as image:
        return image.convert("RGB")


def test_the_last_state_is_the_model_s_greedy_answer(sides: list[Side], rows: list[Any]):
    for side in sides:
        expected = answer_rows(
            side.model, side.processor, rows, max_new_tokens=8, progress=False, batch_size=1
        )
        for row, said in zip(rows, expected, strict=True):
            states = list(answer(side, opened(row), row.question, 8))
            assert states[-1].text == said
            assert [state.done for state in states] == [False] * (len(states) - 1) + [True]
            for before, after in pairwise(states):
                assert after.text.strip().startswith(before.text.strip())
                assert after.tokens >= before.tokens


class Slow:
    """Makes three tokens, at 10, 12 and 14 on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
        self.now, self.tokens, self.options = 7.0, tokens, {}
        monkeypatch.setattr(answering.time, "perf_counter", lambda: self.now)

    def __call__(self, streamer: Any, input_ids: Any, **options: Any) -> None:
        self.options = options
        streamer.put(input_ids)
        for index, token in enumerate(self.tokens):
            self.now = 10.0 + 2 * index
            streamer.put(torch.tensor([token]))
        streamer.end()


def test_figures_are_of_the_tokens_and_not_of_the_text(
    sides: list[Side], rows: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """First token three seconds after the call; then one in two seconds; the end is a token."""
    yes = sides[0].processor.tokenizer.convert_tokens_to_ids(["Yes", "No", "</s>"])
    slow = Slow(monkeypatch, yes)
    monkeypatch.setattr(sides[0].generator, "generate", slow)
    last = list(answer(sides[0], opened(rows[0]), rows[0].question, 8))[-1]
    assert last == Answer("Yes No", 3, first=3.0, rate=0.5, peak=None, done=True)
    assert slow.options["max_new_tokens"] == 8
    assert slow.options["do_sample"] is False
    one = Slow(monkeypatch, yes[:1])
    monkeypatch.setattr(sides[0].generator, "generate", one)
    last = list(answer(sides[0], opened(rows[0]), rows[0].question, 8))[-1]
    assert (last.tokens, last.first, last.rate) == (1, 3.0, None)


def test_closing_ends_the_generation(
    sides: list[Side], rows: list[Any], monkeypatch: pytest.MonkeyPatch
):
    ended = threading.Event()
    word = torch.tensor([sides[0].processor.tokenizer.convert_tokens_to_ids("Yes")])

    def endless(streamer: Any, input_ids: Any, **options: Any) -> None:
        try:
            streamer.put(input_ids)
            while True:
                streamer.put(word)
        finally:
            ended.set()

    monkeypatch.setattr(sides[0].generator, "generate", endless)
    states = answer(sides[0], opened(rows[0]), rows[0].question, 8)
    assert any(state.text.startswith("Yes") for state in states)
    assert not ended.is_set()
    states.close()
    assert ended.is_set()


def test_what_the_model_raises_is_raised(
    sides: list[Side], rows: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def broken(**options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sides[0].generator, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answer(sides[0], opened(rows[0]), rows[0].question, 8))


def test_what_cannot_be_asked_is_refused(sides: list[Side], rows: list[Any]):
    image = opened(rows[0])
    with pytest.raises(ValueError, match="Choose an image first"):
        next(answer(sides[0], None, "What?"))
    with pytest.raises(ValueError, match="Write a question"):
        next(answer(sides[0], image, "  "))
    message = (
        r"Too long for dense: image and question take 2\d tokens, .* up to 500, .* room for 512"
    )
    with pytest.raises(ValueError, match=message):
        next(answer(sides[0], image, rows[0].question, 500))


def test_weights_are_counted_once(sides: list[Side]):
    dense, packed = sides
    parameters = sum(p.numel() * p.element_size() for p in dense.model.parameters())
    assert parameters <= dense.bytes <= parameters + 4096  # and position ids, RoPE's frequencies
    assert packed.bytes < 0.45 * dense.bytes
    tied = torch.nn.Linear(4, 4, bias=False)
    assert weight_bytes(torch.nn.ModuleList([tied, tied])) == 64
    assert (dense.kind, packed.kind) == ("FLOAT32", "INT4")


def test_a_card_escapes_and_says_what_is_known(sides: list[Side]):
    side = sides[1]
    empty = card(side, waiting="<wait>")
    assert "packed &lt;4 bits&gt;" in empty
    assert "&lt;wait&gt;" in empty
    assert empty.count("<dd>–</dd>") == 2
    said = Answer("<script>alert(1)</script>", 3, first=0.0415, rate=132.06, peak=312_000_000)
    live, done = card(side, said), card(side, replace(said, done=True))
    assert "<script>" not in live
    assert "&lt;script&gt;" in live
    assert ' live"' in live
    assert ' live"' not in done
    for figure in ("132.1", "42 <small>ms", "+ 312.00 MB to answer", size(side.bytes)):
        assert figure in done
    assert "(nothing)" in card(side, Answer(done=True))
    assert problem("a < b") == '<div class="problem" role="alert">a &lt; b</div>'


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 kB"), (1499, "1 kB"), (10**6, "1.00 MB"), (4_408_000_000, "4.41 GB")],
)
def test_sizes(count: int, text: str):
    assert size(count) == text
