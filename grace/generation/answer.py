"""One call of `Generator.generate`: the prompt, the first token, the steps behind it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from grace.generation.names import CACHE
from grace.generation.reports import Reports
from grace.generation.steps import MOST_EOS, PlainSteps, StaticSteps
from grace.generation.timing import Clock, Timing

if TYPE_CHECKING:
    from grace.generation.generator import Generator

logger = logging.getLogger(__name__)


class Answer:
    """One call: prompt, first token, steps, end."""

    reports: Reports
    timing: Timing

    def __init__(self, ids: Tensor, processors: Any, criteria: Any, config: Any) -> None:
        self.ids = ids
        self.rows, self.prompt = ids.shape
        self.processors, self.criteria, self.sample = processors, criteria, config.do_sample
        self.new = criteria.max_length - self.prompt
        eos = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        self.eos = torch.cat([e.to(ids.device).view(-1) for e in eos]) if eos else None
        self.ends = any(hasattr(c, "eos_token_id") for c in criteria)
        pad = config._pad_token_tensor
        self.pad: Any = None if pad is None else pad.to(ids.device)
        usual = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in criteria)
        # In a graph: the likeliest token, and the end by a few tokens.
        self.greedy = usual and not processors and not self.sample
        self.greedy = self.greedy and (self.eos is None or len(self.eos) <= MOST_EOS)
        self.clock = Clock(ids.device)

    def make(self, owner: Generator, arguments: dict[str, Any]) -> Tensor:
        """Prompt and answer [rows, tokens]."""
        self.owner, self.model = owner, owner.model
        static = owner.steps_for(self.rows, self.criteria.max_length)
        self.clock.mark("start")
        with owner.filling(static):
            logits, arguments = self._fill(static, arguments)
        steps = self._first(static, logits, arguments)
        self.clock.mark("first")
        ended = self._post(steps)
        owner.capture_prompt()
        if self.new > 1 and not ended:
            with owner.stepping():
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
            arguments[CACHE] = static.cache
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
            steps.capture(self.greedy, self.owner.graph_pool())
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
