"""`grace serve`: transformers' server in a process of its own, asked over HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from packed_models import export_tiny

import grace
from grace.cli import main
from grace.evaluation import mme, synthetic
from grace.evaluation.answer import answer
from grace.integrations import serving

needs_server = pytest.mark.skipif(
    not transformers.utils.import_utils.is_serve_available(),
    reason="needs grace-vlm[serve]: fastapi, uvicorn, openai",
)
SECONDS = 120.0  # it starts within ten; what takes longer hangs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "packed"
    export_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("served") / "drawn"
    synthetic.draw(root, images_per_subtask=1, seed=0)
    return mme.load(root)[:4]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def url(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on this machine; Ctrl-C stops it, with exit code 0."""
    port, log = free_port(), tmp_path_factory.mktemp("served") / "log"
    command = [sys.executable, "-m", "grace.cli", "serve", str(packed), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    while not answers(f"{address}/health"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    yield address
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) in (0, 130), log.read_text()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return json.loads(reply.read()) == {"status": "ok"}
    except OSError:
        return False


def ask(url: str, row: Any, **options: Any) -> str:
    image = base64.b64encode(Path(row.image).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": row.question},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **options}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return reply.read().decode()


@needs_server
def test_the_one_model_is_listed(url: str, packed: Path):
    with urllib.request.urlopen(f"{url}/v1/models", timeout=SECONDS) as reply:
        listed = json.loads(reply.read())
    assert [model["id"] for model in listed["data"]] == [str(packed)]


@needs_server
def test_chat_completions_are_the_model_s_answers(url: str, packed: Path, rows: list[Any]):
    model = transformers.AutoModelForImageTextToText.from_pretrained(packed)
    processor = transformers.AutoProcessor.from_pretrained(packed)
    expected = answer(model, processor, rows, max_new_tokens=4, progress=False)
    assert set(expected) == {"Yes", "No"}
    for row, said in zip(rows, expected, strict=True):
        reply = json.loads(ask(url, row, model=str(packed)))
        assert reply["choices"][0]["message"]["content"].strip() == said
        assert reply["usage"]["prompt_tokens"] > 20  # 16 of them are the image
        events = [line for line in ask(url, row, stream=True).splitlines() if line]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        assert "".join(deltas).strip() == said


@needs_server
def test_another_model_is_not_loaded_on_demand(url: str, rows: list[Any]):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask(url, rows[0], model="someone/else")


@needs_server
@pytest.mark.parametrize(("fuse", "bits"), [(True, None), (False, None), (True, 8)])
def test_the_model_that_is_served_is_packed(fuse: bool, bits: int | None, packed: Path):
    options = {"port": free_port(), "device": "cpu", "non_blocking": True}
    served = serving.serve(str(packed), fuse=fuse, lm_head_bits=bits, **options)
    try:
        (loaded,) = served._model_manager.loaded_models.values()
        layers = [m for m in loaded.model.modules() if isinstance(m, grace.nn.FusedLinear)]
        assert len(layers) == 6 * fuse
        assert grace.nn.unfuse(loaded.model) == [] or fuse
        packed_ones = [m for m in loaded.model.modules() if isinstance(m, grace.nn.PackedLinear)]
        assert len(packed_ones) == 21 + (bits == 8)
        assert isinstance(loaded.model.lm_head, grace.nn.PackedLinear) == (bits == 8)
    finally:
        served.kill_server()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "serve: dtype must be one of auto, bfloat16, float16, float32"),
        (["--lm-head-bits", "4"], "serve: lm_head_bits must be 8, got 4"),
        (["--log-level", "loud"], "serve: log_level must be one of debug, info"),
        (["--port", "0"], "--port"),
        (["--host", "203.0.113.1"], "serve: 203.0.113.1:8000 must be free to listen at, got"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], message: str, packed: Path, capsys: pytest.CaptureFixture[str]
):
    assert message in refused([str(packed), *arguments], capsys)


def test_bad_checkpoints_are_one_line(packed: Path, tmp_path: Path, capsys: Any):
    told = refused([str(tmp_path / "nowhere")], capsys)
    assert "nowhere must be a directory, got nothing" in told


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(packed: Path, capsys: Any):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = refused([str(packed), "--port", str(port)], capsys)
    assert f"serve: 127.0.0.1:{port} must be free to listen at, got" in told


def test_missing_packages_are_told(packed: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "PACKAGES", ("no_such_server",))
    told = refused([str(packed), "--port", str(free_port())], capsys)
    assert "must be installed (pip install grace-vlm[serve]), got no no_such_server" in told


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return told[-1]
