"""Rows to inputs: which tokens are answers, what a batch looks like, what a bad row does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grace.training import Collator, ConversationDataset
from grace.training.callbacks import read_metrics
from grace.training.data import read_rows
from grace.training.encoding import encode
from grace.training.formats import read_conversation
from grace.training.lengths import LengthModel
from grace.training.sequence_packing import PackedDataset

LLAVA_LIKE = (  # turns without an end mark, images before text, a space behind every text
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "gpt" if turn % 2 else "human", "value": text} for turn, text in enumerate(texts)
    ]


def _answers(processor: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The supervised stretches, as text."""
    runs: list[list[int]] = [[]]
    for label in inputs["labels"].tolist():
        if label >= 0:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [processor.tokenizer.decode(run) for run in runs if run]


def _encode(processor: Any, *texts: str, images: int = 1) -> dict[str, torch.Tensor]:
    row = {"image": ["a.png"] * images, "conversations": _turns(*texts)}
    messages = read_conversation(row if images else {**row, "image": None}).messages
    return encode(processor, messages, [Image.new("RGB", (32, 32))] * images)


def test_labels_are_the_answer_and_its_end(processor: Any) -> None:
    inputs = _encode(processor, "<image>\nIs there a red star ?", "Yes")
    assert _answers(processor, inputs) == ["Yes </s>"]
    kept = inputs["labels"] >= 0
    assert torch.equal(inputs["labels"][kept], inputs["input_ids"][kept])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape


def test_labels_of_several_turns_and_images(processor: Any) -> None:
    inputs = _encode(
        processor, "<image> Is there <image> a red star ?", "Yes", "How many ?", "two", images=2
    )
    assert _answers(processor, inputs) == ["Yes </s>", "two </s>"]
    assert inputs["pixel_values"].shape[0] == 2


def test_marked_answers_are_those_of_the_prefixes(processor: Any) -> None:
    plain = copy.copy(processor)
    for mark in ("{% generation %}", "{% endgeneration %}"):
        plain.chat_template = plain.chat_template.replace(mark, "")
    texts = ("<image> Is there <image> a red star ?", "Yes", "How many ?", "two")
    marked, prefixed = (_encode(one, *texts, images=2) for one in (processor, plain))
    assert _answers(processor, marked) == ["Yes </s>", "two </s>"]
    assert torch.equal(marked["labels"], prefixed["labels"])


def test_marks_that_do_not_enclose_every_answer(processor: Any) -> None:
    processor = copy.copy(processor)
    last = "{% if loop.last %}{% generation %}a</s>{% endgeneration %}{% endif %}"
    processor.chat_template = "{% for m in messages %}b " + last + "{% endfor %}"
    with pytest.raises(ValueError, match="template must mark 2 answers of a conversation, got 1"):
        _encode(processor, "How many ?", "two", "Is it ?", "Yes", images=0)


def test_a_text_that_writes_the_mark_of_an_image(processor: Any) -> None:
    messages = read_conversation({"conversations": _turns("What is this ?", "an <image>")}).messages
    with pytest.raises(ValueError, match="holds 1 marks <image>, for 0 images"):
        encode(processor, messages)


def test_videos_for_a_processor_without(processor: Any) -> None:
    row = {"conversations": _turns("<video> How many ?", "two"), "video": "a.mp4"}
    with pytest.raises(ValueError, match="LlavaProcessor takes no videos, got 1"):
        encode(processor, read_conversation(row).messages, (), ["a.mp4"])


def test_frames_of_a_video_are_not_sampled_again(processor: Any) -> None:
    class Seen(Exception):
        pass

    class Watched(type(processor)):
        video_token, video_processor = "<video>", object()

        def __call__(self, **options: Any) -> Any:
            raise Seen(options)

    watched = copy.copy(processor)
    watched.__class__ = Watched
    watched.chat_template = "{{ '<video>' * messages[0]['content'] | length }}{% generation %}a"
    watched.chat_template += "{% endgeneration %}"
    frames = [Image.new("RGB", (8, 8))] * 2
    for videos, expected in (([frames], {"do_sample_frames": False}), (["a.mp4"], None)):
        messages = read_conversation(
            {"conversations": _turns("<video>", "two"), "video": videos}
        ).messages
        with pytest.raises(Seen) as seen:
            encode(watched, messages, (), videos)
        assert seen.value.args[0]["videos"] == videos
        assert seen.value.args[0].get("videos_kwargs") == expected
    both = read_conversation({"conversations": _turns("<video><video>", "a"), "video": ["a", "b"]})
    with pytest.raises(ValueError, match="must all be files or all lists of frames, got both"):
        encode(watched, both.messages, (), [frames, "a.mp4"])


def test_a_beginning_that_the_template_writes_is_not_added_again(processor: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    added = copy.deepcopy(processor)
    start = added.tokenizer.bos_token_id
    added.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    assert added.tokenizer("two").input_ids[0] == start
    ids, expected = (_encode(one, "<image>", "two")["input_ids"] for one in (added, processor))
    assert torch.equal(ids, expected)


def test_a_row_is_cut_at_its_end_but_never_in_an_image(processor: Any) -> None:
    row = {"image": "a.png", "conversations": _turns("Is there <image> ?", "two two two two")}
    found = read_conversation(row)
    images = [Image.new("RGB", (32, 32))]
    whole = encode(processor, found.messages, images)
    length = len(whole["input_ids"])
    cut = encode(processor, found.messages, images, max_length=length - 2, truncate=True)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:-2])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    last = int((whole["input_ids"] == processor.image_token_id).nonzero().max())
    with pytest.raises(ValueError, match=f"max_length {last} would cut its images"):
        encode(processor, found.messages, images, max_length=last, truncate=True)
    with pytest.raises(ValueError, match=f"no token of an answer within {last + 1} tokens"):
        encode(processor, found.messages, images, max_length=last + 1, truncate=True)


def test_a_user_s_own_words_stay_masked(processor: Any) -> None:
    inputs = _encode(processor, "<image>\nIs there ASSISTANT: Yes </s> ?", "No")
    assert _answers(processor, inputs) == ["No </s>"]


def test_a_template_without_end_marks_gets_one_at_the_end(processor: Any) -> None:
    processor = copy.copy(processor)
    processor.chat_template = LLAVA_LIKE
    inputs = _encode(processor, "<image>\nIs there a red star ?", "Yes", "How many ?", "two")
    assert _answers(processor, inputs) == ["Yes", "two </s>"]


def test_a_template_that_does_not_render_turn_after_turn(processor: Any) -> None:
    processor = copy.copy(processor)
    processor.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="chat template must render a turn as prompt and answer"):
        _encode(processor, "Is there a red star ?", "Yes", images=0)


def test_text_alone(processor: Any, tmp_path: Path) -> None:
    rows = [{"conversations": _turns("How many ?", "two")}]
    item = ConversationDataset(rows, processor, tmp_path)[0]
    assert "pixel_values" not in item
    assert _answers(processor, item) == ["two </s>"]


def test_images_that_no_text_mentions_come_first() -> None:
    row = {"image": "a.png", "conversations": _turns("What is this ?", "star")}
    found = read_conversation(row)
    assert found.messages[0]["content"][0] == {"type": "image"}
    assert found.images == ["a.png"]


def test_a_batch_is_padded_on_the_right(dataset: ConversationDataset, processor: Any) -> None:
    items = [dataset[index] for index in (0, 7, 13)]
    batch = Collator(processor)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["pixel_values"].shape[0] == 3
    assert batch["row_ids"].tolist() == [0, 7, 13]
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert batch["labels"][row, length:].eq(-100).all()
        assert batch["attention_mask"][row].sum() == length


BAD = {
    "a list 'conversations' or 'messages'": {"image": None},
    "must have an assistant turn": {"conversations": _turns("How many ?")},
    "turns must alternate": {"conversations": _turns("How many ?", "two", "Why ?")},
    "an answer must not be empty": {"conversations": _turns("How many ?", " ")},
    "1 images for 2 marks": {
        "image": "images/00000.png",
        "conversations": _turns("<image><image>", "two"),
    },
    "no file": {"image": "absent.png", "conversations": _turns("<image>", "two")},
    "a turn must have 'from'": {"conversations": [{"from": "cat", "value": "meow"}]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_an_error_with_its_index(rows_root: Path, processor: Any, reason: str) -> None:
    rows = [*read_rows(rows_root / "train.json")[:3], BAD[reason]]
    with pytest.raises(ValueError, match=f"data: row 3 must be usable, got: .*{reason}"):
        ConversationDataset(rows, processor, rows_root)


def test_bad_rows_are_skipped_and_counted_when_asked_for(rows_root: Path, processor: Any) -> None:
    forms = [row for reason, row in BAD.items() if reason != "no file"]
    rows = [*forms, *read_rows(rows_root / "train.json")[:3], BAD["no file"]]
    dataset = ConversationDataset(rows, processor, rows_root, on_error="skip")
    assert (len(dataset), dataset.skipped) == (4, len(forms))
    assert (dataset[0]["row_ids"], dataset[0]["skipped"]) == (len(forms), 0)
    # The missing file shows when the row is read: the next row, here the first, takes its place.
    assert (dataset[3]["row_ids"], dataset[3]["skipped"]) == (len(forms), 1)
    with pytest.raises(ValueError, match="at least one row must be usable, got 6 bad rows"):
        ConversationDataset(forms, processor, rows_root, on_error="skip")


def test_an_image_that_turns_out_torn(rows_root: Path, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    rows = [
        {"image": name, "conversations": _turns("<image> How many ?", "two")}
        for name in ("torn.png", "good.png")
    ]
    with pytest.raises(ValueError, match="data: row 0 must be usable"):
        ConversationDataset(rows, processor, tmp_path)[0]
    dataset = ConversationDataset(rows, processor, tmp_path, on_error="skip")
    assert (dataset[0]["row_ids"], dataset[0]["skipped"]) == (1, 1)


def test_rows_that_are_too_long(rows_root: Path, processor: Any) -> None:
    rows = read_rows(rows_root / "train.json")[:1]
    with pytest.raises(ValueError, match=r"row 0 must be usable, got: \d+ tokens, max_length is 8"):
        ConversationDataset(rows, processor, rows_root, max_length=8)[0]


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("rows.json", None, FileNotFoundError, "file must exist"),
        ("rows.json", "[]", ValueError, "at least one row"),
        ("rows.jsonl", "", ValueError, "at least one row"),
        ("rows.json", "{", ValueError, "must be JSON"),
        ("rows.jsonl", '{"a": 1}\n{', ValueError, "byte 9 on must be JSON"),
        ("rows.json", '{"a": 1}', ValueError, "must hold a list of rows, got dict"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        list(read_rows(tmp_path / name))


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"conversations": _turns("a", "b")}, {"conversations": _turns("c", "d")}]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + "\n\n")
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows


def test_a_row_is_the_same_however_often_it_is_read(dataset: Callable) -> None:
    first, second = dataset[5], dataset[5]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _torn_rows(rows_root: Path, folder: Path) -> list[dict[str, Any]]:
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n")
    rows = read_rows(rows_root / "train.json")[:8]
    rows = [{**row, "image": str(rows_root / row["image"])} for row in rows]
    rows[2] = {**rows[2], "image": "torn.png"}
    rows[5] = {"conversations": []}
    return rows


def test_a_pack_is_without_rows_that_cannot_be_used(
    rows_root: Path, processor: Any, tmp_path: Path
) -> None:
    rows = _torn_rows(rows_root, tmp_path)
    dataset = ConversationDataset(rows, processor, tmp_path, on_error="skip")
    packed = PackedDataset(dataset, capacity=10_000)
    assert (len(packed), packed.skipped) == (1, 1)
    samples = packed[0]
    assert sorted(sample["row_ids"].item() for sample in samples) == [0, 1, 3, 4, 6, 7]
    assert [sample["skipped"].item() for sample in samples if "skipped" in sample] == [1]
    alone = PackedDataset(dataset, capacity=1)
    assert [len(alone[pack]) for pack in range(len(alone))] == [1] * 7
    assert sum(alone[pack][0]["skipped"].item() for pack in range(len(alone))) == 1
    strict = ConversationDataset(rows[:3], processor, tmp_path, check_files=False)
    with pytest.raises(ValueError, match=r"row 2 must be usable, got: .*torn\.png cannot be dec"):
        PackedDataset(strict, capacity=10_000)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_counts_the_rows_it_skips(
    make_trainer: Callable, rows_root: Path, processor: Any, tmp_path: Path, workers: int
) -> None:
    rows = _torn_rows(rows_root, tmp_path)
    options = {
        "max_steps": 4,  # two epochs
        "distillation": "none",
        "omega": 0.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_num_workers": workers,
        "output_dir": str(tmp_path / "run"),
    }
    trainer = make_trainer(**options)
    dataset = ConversationDataset(rows, processor, tmp_path, on_error="skip")
    trainer.train_dataset, trainer.skipped_rows = dataset, dataset.skipped
    trainer.train()
    logged = [row["skipped_rows"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert logged[-1] == 1 + 2
    assert logged[1] == 1 + 1
    trainer.skipped_rows = 0
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.skipped_rows == 1 + 2


def test_lengths_are_estimated_from_a_few_rows(dataset: ConversationDataset) -> None:
    model = LengthModel.fit(dataset)
    exact = [dataset[item]["input_ids"].numel() for item in range(len(dataset))]
    assert np.abs(model(dataset.facts_of_items(np.arange(48))) - exact).max() <= 2
    assert model == LengthModel.fit(dataset)
    constant = LengthModel(text=0.0, images=0.0, videos=0.0, turns=3.0)
    assert constant(dataset.facts_of_items(np.arange(2))).tolist() == [6, 6]
