"""Rows of every accepted form as one kind of conversation, and what is wrong with the others."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace.training.formats import media_of, read_conversation
from grace.training.media import missing_files, open_image, open_video

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _llava(question: str, **columns: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " two\n"}]
    return {"conversations": turns, **columns}


def _chat(*content: Any, **columns: Any) -> dict[str, Any]:
    question = content[0] if len(content) == 1 else list(content)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "two"}]
    return {"messages": turns, **columns}


ACCEPTED = [
    (_llava("How many ?"), [_text("How many ?")], [], []),
    (_llava("<image>\nHow many ?", image="a.png"), [IMAGE, _text("How many ?")], ["a.png"], []),
    (
        _llava("A <image> B <image>", image=["a.png", "b.png"]),
        [_text("A"), IMAGE, _text("B"), IMAGE],
        ["a.png", "b.png"],
        [],
    ),
    (_llava("Why ?", images=["a.png"]), [IMAGE, _text("Why ?")], ["a.png"], []),
    (_llava("Why ?", image=None, images=[]), [_text("Why ?")], [], []),
    (_llava("<image>", image=b"x"), [IMAGE], [b"x"], []),
    (
        _llava("<image>", image={"bytes": b"x", "path": None}),
        [IMAGE],
        [{"bytes": b"x", "path": None}],
        [],
    ),
    (_llava("<video>\nWhy ?", video="a.mp4"), [VIDEO, _text("Why ?")], [], ["a.mp4"]),
    (
        _llava("<video><image>", video=[["f0.png", "f1.png"]], image="a.png"),
        [VIDEO, IMAGE],
        ["a.png"],
        [["f0.png", "f1.png"]],
    ),
    (_chat("How many <image> ?"), [_text("How many <image> ?")], [], []),
    (_chat("<image> Why ?", images=["a.png"]), [IMAGE, _text("Why ?")], ["a.png"], []),
    (
        _chat({"type": "image", "image": "a.png"}, _text(" Why ?")),
        [IMAGE, _text(" Why ?")],
        ["a.png"],
        [],
    ),
    (
        _chat({"type": "image_url", "image_url": {"url": "a.png"}}, _text("Why ?")),
        [IMAGE, _text("Why ?")],
        ["a.png"],
        [],
    ),
    (
        _chat(IMAGE, _text("Why ?"), {"type": "image", "text": None}, images=["a.png", b"x"]),
        [IMAGE, _text("Why ?"), IMAGE],
        ["a.png", b"x"],
        [],
    ),
    (
        _chat({"type": "video", "path": "a.mp4"}, _text("Why ?")),
        [VIDEO, _text("Why ?")],
        [],
        ["a.mp4"],
    ),
]


@pytest.mark.parametrize(("row", "parts", "images", "videos"), ACCEPTED)
def test_accepted_rows(row: dict, parts: list, images: list, videos: list) -> None:
    found = read_conversation(row)
    assert [message["role"] for message in found.messages] == ["user", "assistant"]
    assert found.messages[0]["content"] == parts
    assert found.messages[1]["content"] == [_text("two")]
    assert (found.images, found.videos) == media_of(row) == (images, videos)


def test_a_system_turn_and_several_answers() -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    row = {"messages": [{"role": role, "content": "über"} for role in roles]}
    found = read_conversation(row)
    assert [message["role"] for message in found.messages] == roles
    assert found.text_bytes == 5 * 5


def _turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a"], "a row must be a mapping, got list"),
        ({"text": "a"}, "must have a list 'conversations' or 'messages'"),
        ({"conversations": []}, "must have an assistant turn"),
        (_turns(("user", "a")), r"must have an assistant turn, got \['user'\]"),
        (_turns(("user", "a"), ("user", "b"), ("assistant", "c")), "turns must alternate"),
        (_turns(("user", "a"), ("assistant", "b"), ("user", "c")), "end with an answer"),
        (_turns(("tool", "a"), ("assistant", "b")), "a turn must have 'role'"),
        (_turns(("user", "a"), ("assistant", " ")), "an answer must not be empty"),
        (_turns(("user", 5), ("assistant", "b")), "must have a 'content' of text or parts"),
        (_turns(("user", [{"type": "audio"}]), ("assistant", "b")), "of type text, image or video"),
        (_turns(("user", "a"), ("assistant", [IMAGE])), "must stand in user turns, got one of"),
        (_llava("<image>"), "0 images for 1 marks"),
        (_llava("<image><image>", image="a.png"), "1 images for 2 marks"),
        (_llava("<video>", image="a.png"), "0 videos for 1 marks"),
        (_chat({"type": "image", "path": "a"}, IMAGE), "got 1 of 2 parts with one and 0 beside"),
        (_chat({"type": "image", "path": "a"}, _text("b"), images=["c"]), "and 1 beside"),
    ],
)
def test_other_rows(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_conversation(row)


def _png(color: str = "red", **options: Any) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 2), color).save(file, "png", **options)
    return file.getvalue()


def test_images_from_paths_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    sources = ["a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", _png()]
    sources += [{"bytes": _png(), "path": "absent"}, {"bytes": None, "path": "a.png"}]
    for source in [*sources, Image.new("RGB", (4, 2), "red")]:
        image = open_image(source, tmp_path)
        assert (image.mode, image.size, image.getpixel((3, 1))) == ("RGB", (4, 2), (255, 0, 0))


def test_a_picture_is_turned_as_its_orientation_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(_png(exif=exif), tmp_path).size == (2, 4)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("absent.png", "no image .*absent.png"),
        ("torn.png", "torn.png cannot be decoded"),
        (_png()[:40], "bytes of an image cannot be decoded"),
        ("https://example.org/a.png", "must be a local file or bytes, got 'https"),
        ("data:image/png;base64,AA==", "must be a local file or bytes, got 'data:"),
        (5, "must be a path or bytes, got 5"),
        ({"bytes": None, "path": None}, "must be a path or bytes, got None"),
    ],
)
def test_images_that_cannot_be_opened(tmp_path: Path, source: Any, reason: str) -> None:
    (tmp_path / "torn.png").write_bytes(_png()[:50])
    with pytest.raises(ValueError, match=reason):
        open_image(source, tmp_path)


def test_a_picture_that_is_far_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(ValueError, match="cannot be decoded: Image size"):
        open_image(_png(), tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    videos = ["v.mp4", ["a.png", "f.png"]]
    with pytest.raises(ValueError, match="must be a path or bytes, got 5"):
        missing_files([5], [], tmp_path)
    missing = missing_files(["a.png", b"x", {"bytes": b"x"}, "b.png"], videos, tmp_path)
    assert [Path(path).name for path in missing] == ["b.png", "v.mp4", "f.png"]


def test_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "v.mp4").write_bytes(b"")
    frames = open_video(["a.png", _png("blue")], tmp_path)
    assert [frame.getpixel((0, 0)) for frame in frames] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match=r"no video .*absent\.mp4"):
        open_video("absent.mp4", tmp_path)
    monkeypatch.setattr("grace.training.media.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs torchcodec.*grace-vlm\[video\]"):
        open_video("v.mp4", tmp_path)
    monkeypatch.setattr("grace.training.media.find_spec", lambda name: name)
    assert open_video({"path": "v.mp4"}, tmp_path) == str(tmp_path / "v.mp4")
