"""The page: an image, a question, and every model's answer beside the others'."""

from __future__ import annotations

import atexit
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr

from grace.demo.answering import Side, answer
from grace.demo.cards import CSS, card, problem

_TITLE = "# {names}\nAsk about an image. {order}Answers are greedy; speeds are this machine's."
_ORDER = "One model answers after the other, so that neither slows the other. "
_FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "sans-serif"]


def make_page(sides: Sequence[Side], max_new_tokens: int = 128) -> gr.Blocks:
    """The page for one or two models; `launch` shows it.

    Raises:
        ValueError: no model, or more than two.
    """
    if not 1 <= len(sides) <= 2:
        raise ValueError(f"demo: models must be one or two, got {len(sides)}")
    drawn = _drawn(sides[0])
    with gr.Blocks(title="grace", analytics_enabled=False) as page:
        names = " and ".join(side.name for side in sides)
        order = _ORDER if len(sides) > 1 else ""
        gr.Markdown(_TITLE.format(names=names, order=order), elem_id="title")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                asking = _Asking(max_new_tokens)
            with gr.Column(scale=8, min_width=420):
                trouble = gr.HTML(visible=False, elem_classes="place")
                with gr.Row(equal_height=True):
                    cards = [gr.HTML(card(side), elem_classes="place") for side in sides]
                inputs = [asking.image, asking.question]
                gr.Examples(drawn, inputs, label="Drawn examples", examples_per_page=4)
        asking.connect(sides, [trouble, *cards])
    page.queue(default_concurrency_limit=1)  # two visitors would slow each other's answers
    return page


class _Asking:
    """The column with what is asked and how."""

    def __init__(self, max_new_tokens: int) -> None:
        sources: list[Any] = ["upload", "clipboard"]
        self.image = gr.Image(
            type="pil", sources=sources, label="Image", height=300, elem_id="image"
        )
        self.question = gr.Textbox(
            label="Question", placeholder="What is in the image?", lines=2, max_lines=6
        )
        with gr.Row():
            self.stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            self.ask = gr.Button("Ask", variant="primary", scale=3, elem_id="ask")
        most = max(1024, max_new_tokens)
        self.length = gr.Slider(1, most, max_new_tokens, step=1, label="Longest answer")

    def connect(self, sides: Sequence[Side], shown: list[Any]) -> None:
        """Lets the buttons, and Enter, ask all sides and show their answers."""

        stopped: set[Any] = set()  # sessions whose visitor wants no more of the answer

        def run(
            image: Any, question: str, tokens: float, request: gr.Request
        ) -> Iterator[list[Any]]:
            stopped.discard(request.session_hash)
            yield from _states(
                sides, image, question or "", int(tokens), lambda: request.session_hash in stopped
            )

        def stop(request: gr.Request) -> None:
            stopped.add(request.session_hash)

        inputs = [self.image, self.question, self.length]
        for started in (self.ask.click, self.question.submit):
            started(run, inputs, shown, show_progress="hidden")
        self.stop.click(stop, queue=False)


def launch(page: gr.Blocks, host: str, port: int, *, wait: bool = True) -> Any:
    """Serves the page, from this machine's files alone.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Soft(
        primary_hue="emerald",
        neutral_hue="slate",
        font=_FONTS,
        font_mono=["ui-monospace", "monospace"],
    )
    return page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        footer_links=[],
        share=False,
        quiet=True,
        prevent_thread_lock=not wait,
    )


def _states(
    sides: Sequence[Side], image: Any, question: str, tokens: int, stopped: Callable[[], bool]
) -> Iterator[list[Any]]:
    """What stands in the place for trouble and in every card, as the answers come."""
    cards = [card(side, waiting="Waiting for its turn …") for side in sides]
    yield [gr.update(visible=False, value=""), *cards]
    for index, side in enumerate(sides):
        cards[index] = card(side, waiting="Reading image and question …")
        yield [gr.skip(), *cards]
        try:
            for state in answer(side, image, question, tokens):
                cards[index] = card(side, state)
                yield [gr.skip(), *cards]
                if stopped():
                    cards[index:] = [card(other) for other in sides[index:]]
                    cards[index] = card(side, replace(state, done=True))
                    yield [gr.skip(), *cards]
                    return
        except Exception as error:  # noqa: BLE001 (whatever it is, the visitor is told)
            told = str(error) if isinstance(error, ValueError) else _told(side, error)
            cards[index:] = [card(other) for other in sides[index:]]
            yield [gr.update(visible=True, value=problem(told)), *cards]
            return


def _told(side: Side, error: Exception) -> str:
    traceback.print_exception(error)  # for who runs the page
    return f"{side.name} could not answer: {type(error).__name__}: {error}"


def _drawn(side: Side) -> list[list[str]]:
    """Images and questions of the drawn benchmark: of the small kind for models of small images."""
    from grace.evaluation import drawing, mme, synthetic
    from grace.evaluation.drawn import benchmark

    vision = getattr(side.model.config, "vision_config", None)
    small = getattr(vision, "image_size", None) == drawing.IMAGE_PIXELS
    folder = tempfile.TemporaryDirectory(prefix="grace-demo-")
    atexit.register(folder.cleanup)
    root = Path(folder.name) / "drawn"
    (synthetic if small else benchmark).draw(root, images_per_subtask=2, seed=1)
    rows = mme.load(root)[::4]  # of each subtask the first image, of its two questions the first
    return [[str(row.image), row.question] for row in rows]
