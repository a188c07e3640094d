"""`Generator`: what `model.generate` says, decoded by captured graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
    StoppingCriteriaList,
)

from grace.generation import fast
from grace.generation.cache import SharedCache, Storage
from grace.generation.head import quantize_head
from grace.generation.liger import liger_layers, replaced
from grace.generation.reports import Reports
from grace.generation.steps import MOST_EOS, PlainSteps, StaticSteps
from grace.generation.timing import Clock, Timing

logger = logging.getLogger(__name__)

_SIZES = 8  # of batch and cache that are kept, with their graphs
_REFUSED = (
    "assistant_model",
    "assistant_tokenizer",
    "cache_implementation",
    "custom_generate",
    "negative_prompt_ids",
    "past_key_values",
    "prompt_lookup_num_tokens",
    "synced_gpus",
)
_RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Generator:
    """Generates as ``model.generate`` does, token for token, with less between the products.

    The prompt goes through the model as ever, images included. Each decode step is one CUDA graph:
    the model on a static cache, the mask, the positions and, where the likeliest token is taken,
    the choice. The host learns of tokens and of the end one step late, and never makes the device
    wait. Where nothing can be captured (a CPU, sliding windows, …) the same loop runs without.

    One generator serves one call at a time. Its caches lie in one memory, as large as the largest
    batch so far needed.

    Args:
        model: any decoder-only model of transformers with images or without, in eval mode, on one
            device. Packed layers should be fused before (`grace.nn.fuse`).
        max_batch_size: most rows a call; a batch is filled up to the next power of two.
        max_length: most tokens a row, prompt and answer; default what the model's positions allow.
        length_step: the cache is that long or a multiple: attention reads no more than needed.
        capture: whether decode steps become CUDA graphs; default where the model is on a GPU.
        compile: torch.compile the decode step first, which fuses what lies between the products:
            True, or a mode of torch.compile without CUDA graphs of its own.
        attention: how decode steps attend, "sdpa", "eager", "grouped" or "flash" (`fast`); default
            as the model does. Results are the same up to rounding.
        lm_head_bits: 8 quantizes the model's output head in place, to nearest with a scale for each
            128 columns. It reads half as much and **changes logits**; off by default.
        liger: let liger-kernel compute RMS norms and rotary embeddings of decode steps, if it is
            installed (``pip install grace-vlm[fast]``); rounding may differ.

    Attributes:
        timing: of the last call (`Timing`), None before.

    Raises:
        ValueError: an argument outside of the above, or an encoder-decoder model.
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
        liger: bool = False,
    ) -> None:
        _check_model(model)
        self.model, self.device = model, model.device
        self.max_batch_size = _at_least_1("max_batch_size", max_batch_size)
        limit = _positions(model) if max_length is None else max_length
        self.max_length = _at_least_1("max_length", limit)
        self.length_step = _at_least_1("length_step", length_step)
        cuda = self.device.type == "cuda"
        if capture and not cuda:
            raise ValueError(f"Generator: capture must be off, got True on {self.device}")
        self.capture = cuda if capture is None else capture
        self.attention = fast.known_attention(attention, model)
        if lm_head_bits is not None:
            quantize_head(model, lm_head_bits)
        self.liger = liger_layers(model) if liger else None
        self._forward = fast.decode_forward(model, compile)
        self._lag = 1 if cuda else 0
        self._why_plain = _why_plain(model)
        if self._why_plain:
            logger.warning("Generator: decodes as transformers does: %s", self._why_plain)
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
        _refuse(kwargs)
        kwargs = _with_stop_strings(kwargs)

        def decode(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return self._decode(input_ids, streamer, **prepared)

        # Buffers are written to by later calls, which need not be in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return self.model.generate(inputs, custom_generate=decode, streamer=streamer, **kwargs)

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
        rows, prompt = input_ids.shape
        length = stopping_criteria.max_length
        self._check(generation_config, arguments, rows, length)
        answer = _Answer(
            self, input_ids, logits_processor, stopping_criteria, generation_config, streamer
        )
        ids = answer.make(arguments)
        self.timing = answer.timing
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids)
        return ids

    def _check(self, config: Any, arguments: Any, rows: int, length: int) -> None:
        mode = config.get_generation_mode()
        if mode not in _MODES:
            raise ValueError(f"Generator: decoding must be greedy or sampled, got {mode.value}")
        asked = [name for name in _RECORDS if getattr(config, name, None)]
        if asked:
            raise ValueError(f"Generator: {asked[0]} must be off, got it on")
        if not arguments.get("use_cache", True):
            raise ValueError("Generator: use_cache must be on, got False")
        if config.prefill_chunk_size is not None:
            raise ValueError("Generator: prefill_chunk_size must be None, got a number")
        if self.model.training:
            raise ValueError("Generator: model must be in eval mode, got training mode")
        if rows > self.max_batch_size:
            limit = f"at most max_batch_size {self.max_batch_size} rows"
            raise ValueError(f"Generator: inputs must have {limit}, got {rows}")
        if length > self.max_length:
            limit = f"prompt and new tokens must be at most max_length {self.max_length}"
            raise ValueError(f"Generator: {limit}, got {length}")

    def _steps_for(self, rows: int, length: int) -> StaticSteps | None:
        """Buffers of the size that holds this; None where there are none of this model."""
        if self._why_plain:
            return None
        batch = min(1 << (rows - 1).bit_length(), self.max_batch_size)
        # One longer than needed: a cache that is full to the last would need no mask.
        size = (batch, -(-(length + 1) // self.length_step) * self.length_step)
        if size not in self._sizes:
            layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
            cache = SharedCache(layers, *size, self._storage, self.device)
            self._sizes[size] = StaticSteps(self.model, cache, self._forward)
            if len(self._sizes) > _SIZES:
                self._sizes.popitem(last=False)
        self._sizes.move_to_end(size)
        return self._sizes[size]

    def _graph_pool(self) -> Any:
        """The memory that all graphs share: no two of them run at once."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class _Answer:
    """One call: prompt, first token, steps, end."""

    def __init__(
        self,
        owner: Generator,
        ids: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
    ) -> None:
        self.owner, self.model, self.ids = owner, owner.model, ids
        self.rows, self.prompt = ids.shape
        self.processors, self.criteria, self.sample = processors, criteria, config.do_sample
        self.new = criteria.max_length - self.prompt
        eos = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        self.eos = torch.cat([e.to(ids.device).view(-1) for e in eos]) if eos else None
        self.ends = any(hasattr(c, "eos_token_id") for c in criteria)
        pad = config._pad_token_tensor
        self.pad = None if pad is None else pad.to(ids.device)
        usual = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in criteria)
        # In a graph: the likeliest token, and the end by a few tokens.
        self.greedy = usual and not processors and not self.sample
        self.greedy = self.greedy and (self.eos is None or len(self.eos) <= MOST_EOS)
        self.reports = Reports(self.rows, owner._lag, ids.device, streamer)
        self.clock = Clock(ids.device)

    def make(self, arguments: dict[str, Any]) -> Tensor:
        """Prompt and answer [rows, tokens]."""
        static = self.owner._steps_for(self.rows, self.criteria.max_length)
        self.clock.mark("start")
        logits, arguments = self._fill(static, arguments)
        steps = self._first(static, logits, arguments)
        self.clock.mark("first")
        ended = self._post(steps)
        if self.new > 1 and not ended:
            with fast.attending(self.model, self.owner.attention), replaced(self.owner.liger):
                steps = self._ready(steps, arguments)
                self.clock.mark("ready")
                self._loop(steps)
        self.clock.mark("end")
        tokens = self.reports.finish()
        self.timing = self.clock.timing(self.rows, self.prompt, tokens)
        return steps.ids[: self.rows, : self.prompt + tokens].clone()

    def _fill(
        self, static: StaticSteps | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The prompt through the model: logits [rows, vocabulary] and the arguments behind it."""
        if static is not None:
            static.cache.filling = True
            arguments["past_key_values"] = static.cache
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, is_first_iteration=True, **arguments
        )
        outputs = self.model(**inputs, return_dict=True)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        return logits, self.model._update_model_kwargs_for_generation(outputs, arguments)

    def _first(
        self, static: StaticSteps | None, logits: Tensor, arguments: dict[str, Any]
    ) -> StaticSteps | PlainSteps:
        """The first token, out of the prompt's logits."""
        if static is None:
            width = self.criteria.max_length
            plain = PlainSteps(self.model, self.ids, width, arguments)
            plain.logits = logits
            self._choose(plain, self.prompt)
            return plain
        static.start(self.ids, self.eos if self.greedy else None, self.pad)
        static.logits = logits
        self._choose(static, self.prompt)
        return static

    def _ready(
        self, steps: StaticSteps | PlainSteps, arguments: dict[str, Any]
    ) -> StaticSteps | PlainSteps:
        """Steps with their buffers filled and their graph captured."""
        if isinstance(steps, PlainSteps):
            return steps
        inputs = self.model.prepare_inputs_for_generation(
            steps.ids[: self.rows, : self.prompt + 1], next_sequence_length=1, **arguments
        )
        why = steps.fits(inputs)
        if why:
            logger.warning("Generator: decodes as transformers does: %s", why)
            plain = PlainSteps(self.model, self.ids, steps.ids.shape[1], arguments)
            plain.ids.copy_(steps.ids[: self.rows])
            plain.unfinished.copy_(steps.unfinished[: self.rows])
            return plain
        steps.load(inputs, self.rows)
        if self.owner.capture:
            steps.capture(self.greedy, self.owner._graph_pool())
        return steps

    def _loop(self, steps: StaticSteps | PlainSteps) -> None:
        for count in range(self.prompt + 1, self.prompt + self.new):
            if isinstance(steps, PlainSteps):
                steps.run(count)
            else:
                steps.run(self.greedy)
            if isinstance(steps, PlainSteps) or not self.greedy:
                self._choose(steps, count)
            if self._post(steps):
                return

    def _choose(self, steps: StaticSteps | PlainSteps, count: int) -> None:
        """The token behind the first ``count``, as `model.generate` chooses it."""
        if self.greedy and isinstance(steps, StaticSteps):
            steps.logits = _filled_rows(steps.logits, len(steps.ids))
            steps.choose()
            return
        ids, unfinished = steps.ids[: self.rows], steps.unfinished[: self.rows]
        scores = self.processors(ids[:, :count], steps.logits[: self.rows].clone())
        if self.sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.ends:
            tokens = torch.where(unfinished == 1, tokens, self.pad)
        ids[:, count].copy_(tokens)
        unfinished.mul_(~self.criteria(ids[:, : count + 1], None))
        steps.tell(tokens)

    def _post(self, steps: StaticSteps | PlainSteps) -> bool:
        report = steps.report
        if len(report) != self.rows + 1:
            report = torch.cat([report[: self.rows], report[-1:]])
        return self.reports.post(report)


def _filled_rows(logits: Tensor, batch: int) -> Tensor:
    """Prompt's logits with as many rows as the buffers have."""
    missing = batch - len(logits)
    return torch.cat([logits, logits[:1].expand(missing, -1)]) if missing else logits


# --- checks --------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if not (hasattr(model, "generate") and hasattr(model, "prepare_inputs_for_generation")):
        kind = type(model).__name__
        raise ValueError(f"Generator: model must be a generating model of transformers, got {kind}")
    if model.config.is_encoder_decoder:
        kind = type(model).__name__
        raise ValueError(f"Generator: model must be decoder-only, got {kind}")


def _at_least_1(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Generator: {name} must be a number of at least 1, got {value!r}")
    return value


def _positions(model: Any) -> int:
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or 2**20)


def _why_plain(model: Any) -> str:
    """Why decode steps of this model cannot run on static buffers; empty where they can."""
    text = model.config.get_text_config(decoder=True)
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return f"it lies on {len(places)} devices"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if getattr(text, "sliding_window", None) is not None:
        kinds.add("sliding_attention")
    if kinds or getattr(text, "attention_chunk_size", None) or not _plain_attention(text):
        return f"its layers have {', '.join(sorted(kinds)) or 'a cache of another kind'}"
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return f"its {rope['rope_type']} rotary embedding looks at the length of the text"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {text._attn_implementation}"
    return ""


def _plain_attention(text: Any) -> bool:
    special = ("kv_lora_rank", "num_kv_shared_layers", "num_experts", "num_local_experts")
    return not any(getattr(text, name, None) for name in special)


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"Generator: {name} must not be given, got one")


def _with_stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``stop_strings`` as a criterion: `model.generate` loses the tokenizer on the way to us."""
    strings, tokenizer = kwargs.get("stop_strings"), kwargs.get("tokenizer")
    if strings is None:
        return kwargs
    if tokenizer is None:
        raise ValueError("Generator: stop_strings must come with tokenizer, got none")
    rest = {k: v for k, v in kwargs.items() if k not in ("stop_strings", "tokenizer")}
    criteria = StoppingCriteriaList(rest.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer, strings))
    return rest | {"stopping_criteria": criteria}
