"""A model's config is asked once for what does not change, and generators take turns."""

from __future__ import annotations

import threading
from typing import Any

import families
import pytest
import torch
from generating import GREEDY, asked, made

from grace.generation import Generator

ASKED = "_get_generation_parameters"


class Made:
    """How many configs of a class are made."""

    def __init__(self, kind: type, patch: pytest.MonkeyPatch) -> None:
        self.count, init = 0, kind.__init__

        def counted(config: Any, *args: Any, **kwargs: Any) -> None:
            self.count += 1
            init(config, *args, **kwargs)

        patch.setattr(kind, "__init__", counted)


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_a_second_call_makes_no_config(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made(kind, num_hidden_layers=1), asked(kind)
    generator = Generator(model)
    exact = model.generate(**inputs, max_new_tokens=2, **GREEDY)
    configs = Made(type(model.config), monkeypatch)
    counts = []
    for _ in range(3):
        assert torch.equal(generator.generate(**inputs, max_new_tokens=2, **GREEDY), exact)
        counts.append(configs.count)
        assert ASKED not in vars(model.config)
    model.generate(**inputs, max_new_tokens=2, **GREEDY)
    # transformers makes one a call without us; none at all since 5.23 or so
    assert (counts, configs.count) in (([1, 1, 1], 2), ([0, 0, 0], 0))


def test_what_is_put_into_the_config_later_is_refused() -> None:
    model, inputs = made("llava", num_hidden_layers=1), asked("llava")
    generator = Generator(model)
    first = generator.generate(**inputs, max_new_tokens=2, **GREEDY)
    model.config.temperature = 0.7
    said = []
    for generate in (model.generate, generator.generate, generator.generate):
        with pytest.raises(ValueError, match=r"'temperature': 0\.7") as error:
            generate(**inputs, max_new_tokens=2, **GREEDY)
        said.append(str(error.value))
        assert ASKED not in vars(model.config)
    assert len(set(said)) == 1
    generation_config = model.generation_config
    given = generator.generate(
        **inputs, generation_config=generation_config, max_new_tokens=2, **GREEDY
    )
    assert torch.equal(given, first)  # then transformers does not ask
    assert ASKED not in vars(model.config)
    del model.config.temperature
    assert torch.equal(generator.generate(**inputs, max_new_tokens=2, **GREEDY), first)


def test_the_config_is_left_as_it_was_by_errors() -> None:
    model = made("llava", num_hidden_layers=1)
    with pytest.raises(ValueError, match="got beam_search"):
        Generator(model).generate(**asked("llava"), max_new_tokens=2, num_beams=2)
    assert ASKED not in vars(model.config)


def test_generators_of_a_model_take_turns() -> None:
    """What each replaces for its answer is not there when another's begins, and not left over."""
    model, inputs = made("llava", packed=True), asked("llava")
    generators = [Generator(model, layers=name) for name in ("grace", "torch", "grace")]
    exact = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    start, found = threading.Barrier(len(generators)), []

    def work(generator: Generator) -> None:
        start.wait()
        asked_thrice = [inputs] * 3
        found.extend(generator.generate(**i, max_new_tokens=4, **GREEDY) for i in asked_thrice)

    threads = [threading.Thread(target=work, args=(generator,)) for generator in generators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(answer, exact) for answer in found)
    assert not any("forward" in vars(module) for module in model.modules())
    assert ASKED not in vars(model.config)


def test_one_generator_may_answer_while_another_streams() -> None:
    model, inputs = made("llava"), asked("llava")
    outer, inner = Generator(model, layers="grace"), Generator(model, layers="grace")
    exact = model.generate(**inputs, max_new_tokens=3, **GREEDY)
    heard = []

    class Asking:
        """Asks the other for every token."""

        def put(self, value: Any) -> None:
            heard.append(inner.generate(**inputs, max_new_tokens=3, **GREEDY))

        def end(self) -> None: ...

    ours = outer.generate(**inputs, max_new_tokens=3, streamer=Asking(), **GREEDY)
    assert torch.equal(ours, exact)
    assert len(heard) == 4  # the prompt, and three tokens
    assert all(torch.equal(answer, exact) for answer in heard)
