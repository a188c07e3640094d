"""What models are scored on: questions with their answers, as one batch of tokens after another.

An answer is the model's first token. The tokenizers have "Yes" and "No" as tokens, so one forward
pass says what greedy generation would, and its logits say how certain it was.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from grace.evaluation import answer, mme
from grace.study.pool import Pool, image_tokens
from grace.study.training import as_inputs

Batch = answer.Batch


@dataclass(frozen=True)
class Questions:
    """Questions in a fixed order, the two about an image one after the other.

    Attributes:
        rows: subtask, an image's name, question and answer.
        levels: of every row; empty where the benchmark has none.
        batches: all rows, as tokens and pixels.
        sample: the same for some rows.
        picture: of a row.
    """

    rows: Sequence[mme.Row]
    levels: Sequence[str]
    batches: Sequence[Batch]
    sample: Callable[[Sequence[int]], Batch]
    picture: Callable[[int], Image.Image]

    @cached_property
    def images(self) -> np.ndarray:
        """The number of every row's image, int32 [rows]: in order of appearance."""
        numbers: dict[tuple[str, str], int] = {}
        keys = [(row.subtask, str(row.image)) for row in self.rows]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)

    def png(self, index: int) -> bytes:
        """The picture of row `index`."""
        file = io.BytesIO()
        self.picture(index).save(file, "png")
        return file.getvalue()


def from_folder(root: Path, processor: Any, batch_size: int) -> Questions:
    """Questions of a benchmark in MME's folder layout."""
    rows = mme.load(root)

    def sample(indices: Sequence[int]) -> Batch:
        return answer.prepare(processor, [rows[i] for i in indices], batch_size=len(indices))[0]

    def picture(index: int) -> Image.Image:
        with Image.open(rows[index].image) as image:
            return image.convert("RGB")

    batches = answer.prepare(processor, rows, batch_size=batch_size)
    return Questions(rows, (), batches, sample, picture)


def from_pool(folder: Path, processor: Any, batch_size: int) -> Questions:
    """Questions of a drawn split; pixels are read when a batch is asked for."""
    pool = Pool(folder)
    rows = [
        mme.Row(
            fact["subtask"],
            Path(f"{fact['level']}-{fact['image']:06d}"),
            fact["question"],
            fact["answer"],
        )
        for fact in pool.facts
    ]
    batches = _PoolBatches(pool, processor, batch_size)
    return Questions(
        rows,
        [fact["level"] for fact in pool.facts],
        batches,
        batches.of,
        lambda index: Image.fromarray(pool.picture(pool.facts[index]["image"])),
    )


class _PoolBatches(Sequence[Batch]):
    """Prompts padded on the left, as processors make them."""

    def __init__(self, pool: Pool, processor: Any, batch_size: int) -> None:
        self.pool, self.size = pool, batch_size
        self.pad = processor.tokenizer.pad_token_id
        count = image_tokens(pool.spec["pixels"])
        self.prompts = [_prompt(processor, fact["question"], count) for fact in pool.facts]

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.size)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = number * self.size
        return self.of(range(start, min(start + self.size, len(self.prompts))))

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def of(self, indices: Sequence[int]) -> Batch:
        """A batch of these rows; pixels uint8 [rows, 3, P, P]."""
        prompts = [self.prompts[index] for index in indices]
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        images = [self.pool.facts[index]["image"] for index in indices]
        pixels = torch.from_numpy(self.pool.pixels[images])
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        return Batch(tuple(indices), inputs)


def _prompt(processor: Any, question: str, count: int) -> list[int]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    text = text.replace(processor.image_token, processor.image_token * count)
    return processor.tokenizer.encode(text, add_special_tokens=False)


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """A batch's inputs where the model is, floating-point ones in its dtype."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    moved = {name: value.to(first.device) for name, value in batch.inputs.items()}
    return {
        name: value.to(first.dtype) if value.is_floating_point() else value
        for name, value in as_inputs(moved).items()
    }


@torch.inference_mode()
def ask(model: Any, processor: Any, batches: Sequence[Batch]) -> tuple[list[str], np.ndarray]:
    """What the model says first to every row, and the entropy of that token.

    Returns:
        One text a row, and float32 [rows] in nats, over the vocabulary at temperature 1.

    Raises:
        ValueError: "Yes" or "No" is not one token, so that a token is no answer.
    """
    for text in ("Yes", "No"):
        tokens = processor.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(f"study: {text} must be one token of the tokenizer, got {tokens}")
    order: list[int] = []
    said: list[Tensor] = []
    entropies: list[Tensor] = []
    for batch in batches:
        inputs = on_device(batch, model)
        # As `generate` numbers them, behind padding on the left.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        output = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
        logs = output.logits[:, -1].float().log_softmax(-1)
        said.append(logs.argmax(-1))
        entropies.append(-(logs.exp() * logs).sum(-1))
        order += batch.indices
    texts = processor.tokenizer.batch_decode(
        torch.cat(said).cpu()[:, None], skip_special_tokens=True
    )
    places = np.argsort(order)
    return [texts[place].strip() for place in places], torch.cat(entropies).cpu().numpy()[places]
