"""The page in a real browser: ask, see both answers and their figures, see what went wrong."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace.cli import main
from grace.demo.answering import Side
from grace.evaluation.answer import answer as answer_rows
from grace.generation import Generator

gradio = pytest.importorskip("gradio", reason="needs grace-vlm[demo]: gradio")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from grace.demo.page import launch, make_page  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt install chromium chromium-driver"
)
SECONDS = 30
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--window-size=1280,1000"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for option in OPTIONS:
        options.add_argument(option)
    service = webdriver.chrome.service.Service(DRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


@pytest.fixture(scope="module")
def address(sides: list[Side]) -> Iterator[str]:
    page, port = make_page(sides, max_new_tokens=8), free_port()
    launch(page, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def page(browser: Any, address: str) -> Page:
    return Page(browser, address)


class Page:
    """What a visitor does and sees."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        browser.get(address)
        self.until(lambda: self.all("#ask") and self.all("tr.tr-body"), "the page")

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text.strip() for element in self.all(selector)]

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        redrawn = (StaleElementReferenceException,)
        wait = WebDriverWait(self.browser, SECONDS, 0.05, ignored_exceptions=redrawn)
        return wait.until(lambda _: condition(), what)

    def upload(self, image: Path) -> None:
        self.all("#image input[type=file]")[0].send_keys(str(image))
        self.until(lambda: self.all("#image img"), "the image")

    def write(self, question: str) -> None:
        """As if pasted: a key at a time, a long question takes half a minute."""
        self.browser.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));",
            self.all("textarea")[0],
            question,
        )

    def take_example(self, number: int) -> str:
        row = self.all("tr.tr-body")[number]
        row.click()
        box = self.all("textarea")[0]
        self.until(lambda: self.all("#image img") and box.get_attribute("value"), "the example")
        return box.get_attribute("value")

    def ask(self) -> None:
        self.all("#ask")[0].click()

    def figures(self) -> list[list[str]]:
        return [
            [dd.text for dd in section.find_elements(By.CSS_SELECTOR, "dd")]
            for section in self.all(".card")
        ]

    def answered(self) -> list[str]:
        done = ".card .text:not(.live):not(.idle)"

        def texts() -> list[str] | None:
            found = self.texts(done)
            return found if len(found) == len(self.all(".card")) else None

        return self.until(texts, "the answers")

    def trouble(self) -> str:
        return self.until(lambda: self.texts(".problem"), "what went wrong")[0]


@needs_browser
def test_both_models_answer_about_an_upload(page: Page, sides: list[Side], rows: list[Any]):
    row = rows[0]
    assert page.texts(".card header b") == ["dense", "packed <4 bits>"]
    assert page.texts(".card .kind") == ["FLOAT32", "INT4"]
    page.upload(row.image)
    page.write(row.question)
    page.ask()
    expected = [
        answer_rows(side.model, side.processor, [row], max_new_tokens=8, progress=False)[0]
        for side in sides
    ]
    assert page.answered() == expected
    for (rate, first, memory), side in zip(page.figures(), sides, strict=True):
        assert float(rate) > 0
        assert float(first.removesuffix(" ms")) > 0
        assert memory == answering_size(side)
    assert page.texts(".problem") == []
    left, right = (section.rect for section in page.all(".card"))
    assert left["y"] == right["y"]  # side by side
    assert left["x"] + left["width"] <= right["x"]


def answering_size(side: Side) -> str:
    from grace.demo.cards import size

    return size(side.bytes)


@needs_browser
def test_examples_can_be_asked(page: Page):
    assert len(page.all("tr.tr-body")) == 4
    assert "in this image?" in page.take_example(1)
    page.ask()
    assert set(page.answered()) <= {"Yes", "No"}


@needs_browser
def test_tokens_show_as_they_come(page: Page, monkeypatch: pytest.MonkeyPatch):
    """The second token is not made before the first was seen."""
    from threading import Event

    import torch

    seen = Event()

    def generate(streamer: Any, input_ids: Any, **options: Any) -> None:
        tokenizer = streamer.tokenizer
        streamer.put(input_ids)
        for word in ("Yes", "No", "</s>"):
            streamer.put(torch.tensor([tokenizer.convert_tokens_to_ids(word)]))
            if word == "No":  # the streamer holds the last word back
                assert seen.wait(SECONDS)
        streamer.end()

    monkeypatch.setattr(Generator, "generate", staticmethod(generate))
    page.take_example(0)
    page.ask()
    page.until(lambda: page.texts(".card .text.live") == ["Yes"], "the first word")
    assert page.texts(".card .text.idle") == ["Waiting for its turn …"]
    seen.set()
    assert page.answered() == ["Yes No", "Yes No"]


@needs_browser
def test_stop_ends_an_answer_and_the_next_works(page: Page, monkeypatch: pytest.MonkeyPatch):
    from threading import Event

    import torch

    ended = Event()

    def endless(streamer: Any, input_ids: Any, **options: Any) -> None:
        word = torch.tensor([streamer.tokenizer.convert_tokens_to_ids("Yes")])
        streamer.put(input_ids)
        try:
            while True:
                streamer.put(word)
                assert not ended.wait(0.01)
        finally:
            ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", staticmethod(endless))
        page.take_example(0)
        page.ask()
        page.until(lambda: page.texts(".card .text.live"), "an answer that goes on")
        page.all("#stop")[0].click()
        assert ended.wait(SECONDS)
        page.until(lambda: not page.all(".card .text.live"), "the end")
        said, waiting = page.texts(".card .text")
        assert said.startswith("Yes Yes")  # what was said stays
        assert waiting == "Its answer will stand here."
    page.ask()
    assert set(page.answered()) <= {"Yes", "No"}


@needs_browser
def test_what_went_wrong_is_on_the_page(page: Page, rows: list[Any], monkeypatch, capfd):
    page.ask()
    assert page.trouble() == "Choose an image first: upload one, or take an example."
    page.upload(rows[0].image)
    page.ask()
    page.until(lambda: "Write a question" in page.trouble(), "that there is no question")
    page.write("diamond " * 510)
    page.ask()
    page.until(lambda: "Too long for dense: image and question take" in page.trouble(), "too long")

    def broken(**options: Any) -> None:
        raise RuntimeError("no <memory>")

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", staticmethod(broken))
        page.write(rows[0].question)
        page.ask()
        told = "dense could not answer: RuntimeError: no <memory>"
        page.until(lambda: page.trouble() == told, "that it is broken")
    assert "RuntimeError: no <memory>" in capfd.readouterr().err
    page.ask()
    assert set(page.answered()) <= {"Yes", "No"}
    assert page.texts(".problem") == []


@needs_browser
def test_it_needs_no_other_machine_and_makes_no_errors(page: Page, address: str, browser: Any):
    import json

    page.take_example(0)
    page.ask()
    page.answered()
    errors = [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
    ]
    assert [error for error in errors if "AbortError" not in error] == []  # of pages that were left
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert urls
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []


@needs_browser
def test_one_model_alone(browser: Any, sides: list[Side], tmp_path: Path):
    page, port = make_page(sides[1:], max_new_tokens=4), free_port()
    launch(page, "127.0.0.1", port, wait=False)
    try:
        visit = Page(browser, f"http://127.0.0.1:{port}")
        assert visit.texts(".card header b") == ["packed <4 bits>"]
        picture = tmp_path / "picture.png"
        Image.new("RGB", (200, 100), "red").save(picture)
        visit.upload(picture)
        visit.write("Is there a circle in this image?")
        visit.ask()
        assert len(visit.answered()) == 1
    finally:
        page.close(verbose=False)


def test_one_or_two_models(sides: list[Side]):
    for models in ([], [*sides, sides[0]]):
        with pytest.raises(ValueError, match=f"models must be one or two, got {len(models)}"):
            make_page(models)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "c"], "demo: models must be one or two, got 3"),
        (["./nowhere"], "nowhere must be a directory, got nothing"),
        (["."], "config.json must exist, got no such file"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_gradio_missing_is_told(capsys, tmp_path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    from grace.evaluation import tiny

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name)
    )
    with pytest.raises(SystemExit):
        main(["demo", str(tiny.student_dir())])
    assert "gradio must be installed (pip install grace-vlm[demo])" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", str(tmp_path / "nosuch")])  # the model first: that is what was asked for
    assert "nosuch" in capsys.readouterr().err
