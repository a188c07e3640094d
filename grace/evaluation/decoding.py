"""How the benchmarks' answers are decoded: as served, or by transformers alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace.generation import Generator

logger = logging.getLogger(__name__)


class Decoder:
    """Continues prompts as the model is served: by `Generator`, which says what `generate` says.

    ``model.generate`` does it where a generator would not: encoder-decoder models, beams, a single
    new token (there is no step behind the prompt), and prompts that with their answers are longer
    than the model has positions for. A generator is made when it is needed first, and kept.

    Args:
        model: of transformers, in eval mode when it is called.
        max_batch_size: most rows a call.
        graphs: False leaves everything to ``model.generate``.

    Raises:
        ValueError: a batch size below 1.
    """

    def __init__(self, model: Any, *, max_batch_size: int = 64, graphs: bool = True) -> None:
        if max_batch_size < 1:
            raise ValueError(f"decode: max_batch_size must be at least 1, got {max_batch_size}")
        self.model, self.max_batch_size, self.graphs = model, max_batch_size, graphs
        self._generator: Generator | None = None

    def __call__(self, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any) -> Tensor:
        """New tokens of every row, int64 [rows, at most ``max_new_tokens``], on the model's device.

        Args:
            inputs: processor output, padded on the left; moved to the model's device, and what is
                floating-point to its dtype.
            max_new_tokens: most new tokens a row; rows that end first are filled up.
            options: of ``model.generate``, such as ``do_sample`` and ``temperature``.

        Raises:
            ValueError: more rows than ``max_batch_size`` decoded by a generator.
        """
        placed = {
            name: value.to(self.model.device, self._dtype_of(value))
            for name, value in inputs.items()
        }
        prompt = placed["input_ids"].shape[1]
        options = {**options, "max_new_tokens": max_new_tokens}
        if self._by_generator(prompt, max_new_tokens, options.get("num_beams")):
            return self._made_generator().generate(**placed, **options)[:, prompt:]
        with torch.inference_mode():
            found = self.model.generate(**placed, **options)
        return found if self.model.config.is_encoder_decoder else found[:, prompt:]

    def _dtype_of(self, value: Tensor) -> torch.dtype | None:
        return self.model.dtype if value.is_floating_point() else None

    def _by_generator(self, prompt: int, new: int, beams: int | None) -> bool:
        if not self.graphs or new == 1 or self.model.config.is_encoder_decoder:
            return False
        if (beams or getattr(self.model.generation_config, "num_beams", None) or 1) > 1:
            return False
        limit = self._made_generator().max_length
        if prompt + new > limit:
            logger.warning(
                "decode: prompt and answer may take %d tokens, the model has %d positions: "
                "left to model.generate",
                prompt + new,
                limit,
            )
        return prompt + new <= limit

    def _made_generator(self) -> Generator:
        if self._generator is None:
            self._generator = Generator(self.model, max_batch_size=self.max_batch_size)
        return self._generator
