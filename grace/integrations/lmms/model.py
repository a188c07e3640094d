"""Models of grace, packed or not, as a model of lmms-eval."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from torch import Tensor
from tqdm.auto import tqdm

from grace.evaluation.answer import encode
from grace.evaluation.decoding import Decoder
from grace.integrations.lmms.requests import (
    conversation,
    cut,
    ends_of,
    new_tokens,
    options_of,
)
from grace.models import load_model


class Grace(lmms):
    """Answers lmms-eval's ``generate_until`` requests, decoded as the model is served.

    Args:
        pretrained: checkpoint directory or hub name, as for ``grace evaluate``; packed and
            in-training checkpoints are recognised.
        dtype: auto, bfloat16, float16 or float32.
        device: cpu or cuda[:n]; default the GPU if there is one. With several processes each takes
            the GPU of its rank.
        batch_size: requests a batch, those of one length and one kind together.
        max_batch_size: not used; lmms-eval passes it to every model.
        max_new_tokens: of tasks that do not say.
        fuse: run packed layers of one input as one.
        graphs: decode by `grace.generation.Generator`; False: by ``model.generate``.

    Raises:
        ValueError: a number below 1, an unknown dtype or device, or a damaged checkpoint.
        OSError: nothing of that name, or an incomplete checkpoint.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        max_new_tokens: int = 128,
        fuse: bool = True,
        graphs: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size = _at_least_1("batch_size", batch_size)
        self._max_new_tokens = _at_least_1("max_new_tokens", max_new_tokens)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = self._join(device)
        model, self.processor = load_model(str(pretrained), dtype, device, fuse)
        self._decoder: Any = Decoder(model, max_batch_size=self.batch_size, graphs=graphs)
        self.device = model.device

    def _join(self, device: str | None) -> str:
        """Takes part in what several processes do; the device of this one."""
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if device == "cpu" or not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.accelerator.local_process_index}"

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._decoder.model

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer a request, in their order, with the numbers of tokens it took and has.

        Requests with the same generation arguments share batches, the longest first.

        Raises:
            ValueError: a request with content other than text and images.
        """
        found: dict[int, Any] = {}
        with tqdm(total=len(requests), desc="answer", disable=self.rank != 0) as bar:
            for places in _kinds([request.args for request in requests]):
                asked = requests[places[0]].args[2]
                options, ends = options_of(asked, self._max_new_tokens), ends_of(asked)
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    said = self._answers([requests[place].args for place in batch], options, ends)
                    found.update(zip(batch, said, strict=True))
                    bar.update(len(batch))
        return [found[place] for place in range(len(requests))]

    def _answers(
        self, batch: Sequence[tuple[Any, ...]], options: dict[str, Any], ends: Sequence[str]
    ) -> list[Any]:
        """Of requests (context, messages of a document, generation arguments, id, task, split)."""
        inputs = self._inputs(batch)
        tokens: Tensor = self._decoder(inputs, **options)
        texts = self.processor.tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        mask, eos = inputs["attention_mask"], self._eos()
        return [
            GenerationResult(
                text=cut(text, ends),
                token_counts=TokenCounts(
                    input_tokens=int(mask[row].sum()), output_tokens=new_tokens(ids, eos)
                ),
            )
            for row, (text, ids) in enumerate(zip(texts, tokens.tolist(), strict=True))
        ]

    def _inputs(self, batch: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        texts, pictures = list[str](), list[Any]()
        for _context, messages_of, _asked, doc, task, split in batch:
            turns, shown = conversation(messages_of(self.task_dict[task][split][doc]))
            texts.append(
                self.processor.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=False
                )
            )
            pictures += shown
        return encode(self.processor, texts, pictures)

    def _eos(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not done: raises NotImplementedError."""
        raise NotImplementedError("lmms: tasks must generate answers, got one of loglikelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not done: raises NotImplementedError."""
        raise NotImplementedError("lmms: tasks must have one round, got one of several")

    def clean(self) -> None:
        """Frees the model: lmms-eval is through with it."""
        self._decoder = None
        super().clean()


def _at_least_1(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"lmms: {name} must be a number of at least 1, got {value!r}")
    return number


def _kinds(arguments: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """Places of requests with the same generation arguments, the longest first."""
    kinds: dict[str, list[int]] = {}
    for place, one in enumerate(arguments):
        kinds.setdefault(json.dumps(one[2], sort_keys=True, default=str), []).append(place)
    for places in kinds.values():
        places.sort(key=lambda place: -len(str(arguments[place][0])))
    return list(kinds.values())
