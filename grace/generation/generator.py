"""`Generator`: what `model.generate` says, decoded by captured graphs."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from grace.generation import checks, fast
from grace.generation.answer import Answer
from grace.generation.cache import SharedCache, Storage
from grace.generation.configs import LookOnce
from grace.generation.layers import known_layers, replaced
from grace.generation.prefill import Prefill
from grace.generation.reports import Reports
from grace.generation.steps import StaticSteps
from grace.generation.timing import Timing
from grace.nn.head import check_head, quantize_head

logger = logging.getLogger(__name__)

_SIZES = 8  # of batch and cache that are kept, with their graphs
_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of models
_LOCKS_LOCK = threading.Lock()


class Generator:
    """Generates as ``model.generate`` does, token for token, with less between the products.

    The prompt goes through the model as ever, images included (but see ``prefill_step``). Each
    decode step is one CUDA graph: the model on a static cache, the mask, the positions and, where
    the likeliest token is taken, the choice. The host learns of tokens and of the end one step
    late, and never makes the device wait. Where nothing can be captured (a CPU, sliding windows, …)
    the same loop runs without.

    One call at a time goes through a model, whose layers are replaced meanwhile; calls of other
    threads, of its other generators, too, wait. Caches of a generator lie in one memory, as large
    as the largest batch so far needed.

    Args:
        model: any decoder-only model of transformers with images or without, in eval mode, on one
            device. Packed layers should be fused before (`grace.nn.fuse`).
        max_batch_size: most rows a call; a batch is filled up to the next power of two.
        max_length: most tokens a row, prompt and answer; default what the model's positions allow.
        length_step: the cache is that long or a multiple: attention reads no more than needed.
        capture: whether decode steps become CUDA graphs; default where the model is on a GPU.
        compile: torch.compile the decode step first, which fuses what lies between the products:
            True, or a mode of torch.compile without CUDA graphs of its own.
        attention: how decode steps attend, "sdpa", "eager", "grouped", "flex" or "flash" (`fast`);
            default as ``layers`` do. Results are the same up to rounding.
        lm_head_bits: 8 quantizes the model's output head in place, to nearest with a scale for each
            128 columns. It reads half as much and **changes logits**; off by default.
        layers: what computes decoder layers: "grace", layers of our own ops, prompts included, for
            Llama, Mistral, Qwen2, Qwen3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and what is made of them;
            "transformers", as they are; or those with other RMS norms in decode steps, "torch" (its
            fused norm) or "liger", which does rotary embeddings, too, and must be installed (``pip
            install grace-vlm[fast]``). Default "grace" on a GPU where no attention is given and the
            model fits, otherwise "transformers", and the log (INFO) says why. Results are the same
            up to rounding.
        prefill_step: runs the language model's part of a prompt on static buffers, too, and as a
            CUDA graph from the second prompt of a size on; a prompt is filled up on its right to a
            multiple of this many tokens, as 128. Results are the same up to rounding. None: prompts
            run as they are.

    Attributes:
        timing: of the last call (`Timing`), None before.

    Raises:
        ValueError: an argument outside of the above, an encoder-decoder model, or layers "grace"
            with an attention or for a model that they do not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int = 32,
        max_length: int | None = None,
        length_step: int = 256,
        capture: bool | None = None,
        compile: bool | str = False,
        attention: str | None = None,
        lm_head_bits: int | None = None,
        layers: str | None = None,
        prefill_step: int | None = None,
    ) -> None:
        checks.check_model(model)
        self.model, self.device = model, model.device
        self.max_batch_size = checks.at_least_1("max_batch_size", max_batch_size)
        limit = checks.positions(model) if max_length is None else max_length
        self.max_length = checks.at_least_1("max_length", limit)
        self.length_step = checks.at_least_1("length_step", length_step)
        cuda = self.device.type == "cuda"
        if capture and not cuda:
            raise ValueError(f"Generator: capture must be off, got True on {self.device}")
        self.capture = cuda if capture is None else capture
        self.attention = fast.known_attention(attention, model)
        if lm_head_bits is not None:
            check_head("Generator", model, lm_head_bits)
            quantize_head(model, lm_head_bits)
        self._model_lock = _lock_of(model)
        with self._model_lock:  # in an answer of another generator layers are not what they are
            self.layers = known_layers(layers, model, attention)
        self._forward = fast.decode_forward(model, compile)
        self.compiles = bool(compile) or attention == "flex"
        self._lag = 1 if cuda else 0
        self._why_plain = checks.why_plain(model)
        if self._why_plain:
            logger.warning("Generator: decodes as transformers does: %s", self._why_plain)
        self._prefill = None if prefill_step is None else self._prefill_of(prefill_step)
        self._lock = threading.Lock()
        self._looks = LookOnce()
        self._storage = Storage()
        self._sizes: OrderedDict[tuple[int, int], StaticSteps] = OrderedDict()
        self._pool: Any = None
        self.timing: Timing | None = None

    def generate(self, inputs: Tensor | None = None, *, streamer: Any = None, **kwargs: Any) -> Any:
        """The same as ``model.generate`` with the same arguments, greedy or sampled.

        Args:
            inputs: prompt ids [rows, tokens], if not given as ``input_ids``; padded on the left.
            streamer: a transformers ``BaseStreamer``; gets the prompt, then tokens one step behind
                the device.
            **kwargs: processor output (``input_ids``, ``attention_mask``, ``pixel_values``, …) and
                whatever ``GenerationConfig`` knows: ``max_new_tokens``, ``do_sample``,
                ``temperature``, ``top_p``, ``top_k``, ``repetition_penalty``, ``eos_token_id``,
                ``stop_strings`` with ``tokenizer``, ``num_return_sequences``, …; also
                ``generation_config``, ``logits_processor``, ``stopping_criteria``.

        Returns:
            int64 [rows, tokens]: prompt and answer; rows that ended first are filled with the pad
            token. With ``return_dict_in_generate`` a ``GenerateDecoderOnlyOutput`` of sequences.

        Raises:
            ValueError: more rows or tokens than the generator is for; beams, assistants and other
                ways to decode; records of scores, logits, attentions or hidden states; a cache of
                one's own.
        """
        checks.refuse(kwargs)
        kwargs = checks.with_stop_strings(kwargs)
        given = {"inputs": inputs, **kwargs}
        given = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in given.items()}

        def decode(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return self._decode(input_ids, streamer, **prepared)

        # Buffers are written to by later calls, which need not be in inference mode.
        with (
            self._model_lock,
            self._lock,
            self._on_device(),
            self._looks.asking(self.model.config),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            return self.model.generate(custom_generate=decode, streamer=streamer, **given)

    def _prefill_of(self, step: int) -> Prefill | None:
        """What prompts go through; None, and a warning, for a model whose prompts cannot."""
        step = checks.at_least_1("prefill_step", step)
        why = self._why_plain or checks.why_no_layers(self.model)
        if not why:
            return Prefill(self.model, step)
        logger.warning("Generator: prompts run as transformers runs them: %s", why)
        return None

    def _on_device(self) -> Any:
        cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device) if cuda else contextlib.nullcontext()

    def _decode(
        self,
        input_ids: Tensor,
        streamer: Any,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **arguments: Any,
    ) -> Any:
        """What `model.generate` calls when its arguments are checked and made."""
        checks.check_decoding(generation_config, arguments)
        self._check_size(len(input_ids), stopping_criteria.max_length)
        answer = Answer(input_ids, logits_processor, stopping_criteria, generation_config)
        answer.reports = Reports(answer.rows, self._lag, self.device, streamer)
        found: Any = answer.make(self, arguments)
        self.timing = answer.timing
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=found)
        return found

    def _check_size(self, rows: int, length: int) -> None:
        if self.model.training:
            raise ValueError("Generator: model must be in eval mode, got training mode")
        if rows > self.max_batch_size:
            limit = f"at most max_batch_size {self.max_batch_size} rows"
            raise ValueError(f"Generator: inputs must have {limit}, got {rows}")
        if length > self.max_length:
            limit = f"prompt and new tokens must be at most max_length {self.max_length}"
            raise ValueError(f"Generator: {limit}, got {length}")

    def steps_for(self, rows: int, length: int) -> StaticSteps | None:
        """Buffers of the size that holds this; None where there are none of this model."""
        if self._why_plain:
            return None
        batch = min(1 << (rows - 1).bit_length(), self.max_batch_size)
        # One longer than needed: a cache that is full to the last would need no mask.
        size = (batch, -(-(length + 1) // self.length_step) * self.length_step)
        if size not in self._sizes:
            layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
            cache = SharedCache(layers, *size, self._storage, self.device)
            added = self.layers.name != "grace"  # which take bool masks
            self._sizes[size] = StaticSteps(self.model, cache, self._forward, added)
            if len(self._sizes) > _SIZES:
                self._sizes.popitem(last=False)
        self._sizes.move_to_end(size)
        return self._sizes[size]

    @contextlib.contextmanager
    def filling(self, static: StaticSteps | None) -> Iterator[None]:
        """Inside, the prompt goes through the model and fills these steps' cache."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(self.layers.prompts))
            if self._prefill is not None and static is not None:
                stack.enter_context(self._prefill.filling(static.cache))
            yield

    def capture_prompt(self) -> None:
        """Captures what the prompt went through, for the next of its size."""
        if self._prefill is not None and self.capture:
            with replaced(self.layers.prompts):
                self._prefill.capture(self.graph_pool())

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, the model computes decode steps as this generator does."""
        with (
            fast.attending(self.model, self.attention),
            replaced(self.layers.steps),
            fast.many_programs(self.compiles),
        ):
            yield

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values that is held between calls."""
        return self._storage.bytes

    def graph_pool(self) -> Any:
        """The memory that all graphs share: no two of them run at once."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def _lock_of(model: Any) -> Any:
    """What a model's generators take in turns; one that answers inside another's callbacks may."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())
