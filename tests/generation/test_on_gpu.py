"""On a GPU: captured graphs against `model.generate`, and other ways to compute a step."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from generating import GREEDY, NEW, SAMPLED, asked, both, logits_of, made
from torch import Tensor

from grace.generation import Generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_gpu(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: value.to("cuda", dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_captured_steps_say_the_same(kind: str) -> None:
    model: Any = made(kind).cuda()
    inputs = on_gpu(asked(kind), torch.float32)
    generator = Generator(model)
    for arguments in (GREEDY, SAMPLED, GREEDY):
        arguments = {**arguments, "disable_compile": True}
        theirs, ours = both(model, generator, inputs, **arguments)
        assert torch.equal(theirs, ours), arguments
        end = int(ours[0, -5])
        theirs, ours = both(model, generator, inputs, eos_token_id=end, **arguments)
        assert torch.equal(theirs, ours), arguments
    (steps,) = generator._sizes.values()
    assert sorted(steps._graphs) == [False, True]


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl"])
def test_a_replay_is_the_step_bit_for_bit(kind: str) -> None:
    model: Any = made(kind, packed=True).bfloat16().cuda()
    inputs = on_gpu(asked(kind), torch.bfloat16)
    captured = logits_of(Generator(model).generate, inputs)
    eager = logits_of(Generator(model, capture=False).generate, inputs)
    assert torch.equal(captured, eager)


def shorter(inputs: dict[str, Tensor], less: int) -> dict[str, Tensor]:
    """Without as many of the last words."""
    cut = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {k: v[:, : v.shape[1] - less] if k in cut else v for k, v in inputs.items()}


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_captured_prompts_say_the_same(kind: str) -> None:
    """One after another in a bucket with a mask, and in one without."""
    model: Any = made(kind).cuda()
    generator = Generator(model, prefill_step=64, length_step=64)
    for padded in (True, False):
        for less in (0, 1, 0, 2):
            inputs = shorter(on_gpu(asked(kind, padded), torch.float32), less)
            theirs, ours = both(model, generator, inputs, **GREEDY, disable_compile=True)
            assert torch.equal(theirs, ours), (padded, less)
    buckets = list(generator._prefill._buckets.values())
    assert [bucket.is_captured() for bucket in buckets] == [True, True]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl"])
def test_a_replayed_prompt_is_the_prompt_bit_for_bit(kind: str, padded: bool) -> None:
    model: Any = made(kind, packed=True).bfloat16().cuda()
    inputs = on_gpu(asked(kind, padded), torch.bfloat16)
    generator = Generator(model, prefill_step=64)
    eager = logits_of(Generator(model, prefill_step=64, capture=False).generate, inputs)
    for _ in range(3):
        assert torch.equal(logits_of(generator.generate, inputs), eager)
    usual = logits_of(Generator(model).generate, inputs)
    noise = (usual - logits_of(model.generate, inputs)).abs().max()
    assert (eager - usual).abs().max() <= 4 * noise + 0.02 * usual.abs().max()


def test_a_captured_prompt_attends_without_masks() -> None:
    """By a kernel that takes none, as a prompt that is not captured; without images, whose tower
    attends by the same."""
    model: Any = made("llava", hidden_size=256).bfloat16().cuda()  # heads of 64
    given = on_gpu(asked("llava", padded=False), torch.bfloat16)
    inputs = {name: given[name][:, -4:] for name in ("input_ids", "attention_mask")}
    generator = Generator(model, prefill_step=64)
    generator.generate(**inputs, max_new_tokens=1, **GREEDY)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        generator.generate(**inputs, max_new_tokens=1, **GREEDY)
        torch.cuda.synchronize()
    kernels = [event.key.lower() for event in profile.key_averages()]
    assert any("flash" in kernel or "cudnn" in kernel for kernel in kernels), kernels


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "grouped"},
        {"attention": "flex"},
        {"attention": "flash"},
        {"compile": True},
        {"compile": True, "attention": "grouped"},
        {"compile": True, "attention": "flex"},
        {"compile": True, "attention": "flash"},
        {"layers": "torch"},
        {"layers": "liger"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_other_ways_to_compute_a_step(kind: str, options: dict[str, Any]) -> None:
    if options.get("layers") == "liger":
        pytest.importorskip("liger_kernel")
    text = {"hidden_size": 128, "num_key_value_heads": 4 if kind == "llava" else 2}
    text |= {"head_dim": 32} if kind == "qwen3_vl" else {}
    if kind == "qwen3_vl":
        text["rope_parameters"] = {**families._ROPE, "mrope_section": [8, 4, 4]}
    model: Any = made(kind, packed=True, **text).bfloat16().cuda()
    inputs = on_gpu(asked(kind), torch.bfloat16)
    usual = logits_of(Generator(model).generate, inputs)
    ours = logits_of(Generator(model, **options).generate, inputs)
    noise = (usual - logits_of(model.generate, inputs)).abs().max()
    assert (ours - usual).abs().max() <= 4 * noise + 0.02 * usual.abs().max()


# --- decoder layers of our own ops ---------------------------------------------------------------


def with_heads_of(kind: str, dim: int, packed: bool, **text: Any) -> Any:
    """A model in bfloat16 that has four heads of this size, on the GPU."""
    sizes = {"hidden_size": 4 * dim, "intermediate_size": 4 * dim, **text}
    sizes |= {"head_dim": dim} if kind == "qwen3_vl" else {}
    if kind in families.QWEN:
        sections = [dim // 4, dim // 8, dim // 8]
        sizes["rope_parameters"] = {**families._ROPE, "mrope_section": sections}
    return made(kind, packed, **sizes).bfloat16().cuda()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_our_layers_are_the_default_and_as_near_to_the_truth(
    kind: str, packed: bool, dim: int
) -> None:
    """Root mean square errors of logits to those in float32, captured and as transformers says."""
    model, truth = (with_heads_of(kind, dim, packed) for _ in range(2))
    truth.float().cpu()  # where packed weights take float32
    generator = Generator(model)
    assert generator.layers.name == "grace"
    for padded in (True, False):
        words = asked(kind, padded)
        inputs = on_gpu(words, torch.bfloat16)
        theirs, ours = (logits_of(g, inputs) for g in (model.generate, generator.generate))
        assert torch.equal(logits_of(generator.generate, inputs), ours)  # replayed
        rounded = {k: v.to(inputs[k].dtype).to(v.dtype) for k, v in words.items()}
        exact = logits_of(truth.generate, rounded).to(ours.device)
        error, noise = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
        assert 0 < error <= 1.5 * noise, padded
    (steps,) = generator._sizes.values()
    assert list(steps._graphs) == [False]


@pytest.mark.parametrize("prefill_step", [None, 64])
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl"])
def test_a_replay_of_our_layers_is_the_step_bit_for_bit(
    kind: str, prefill_step: int | None
) -> None:
    model = with_heads_of(kind, 64, packed=True)
    inputs = on_gpu(asked(kind), torch.bfloat16)
    options = {"prefill_step": prefill_step, "layers": "grace"}
    generator = Generator(model, **options)
    eager = logits_of(Generator(model, capture=False, **options).generate, inputs)
    for _ in range(3):
        assert torch.equal(logits_of(generator.generate, inputs), eager)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_a_step_of_our_layers_is_seven_kernels_a_layer(kind: str) -> None:
    """The difference between models of two layers and of four: what else a step is falls away."""
    launches = []
    for layers in (2, 4):
        model = with_heads_of(kind, 128, packed=True, num_hidden_layers=layers)
        inputs = on_gpu(asked(kind, padded=False), torch.bfloat16)
        generator = Generator(model, layers="grace", capture=False)
        generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
        (steps,) = generator._sizes.values()
        steps.cache.position.fill_(inputs["input_ids"].shape[1])
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with generator.stepping(), torch.no_grad():
            steps.run(True)
            with torch.profiler.profile(activities=activities) as profile:
                steps.run(True)
                torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA  # calls of the runtime are events, too
        launches.append(sum(event.device_type == on_device for event in profile.events()))
    assert (launches[1] - launches[0]) / 2 <= 7


@pytest.mark.parametrize("count", [1, 3])
def test_our_layers_with_batches_and_samples(count: int) -> None:
    model = with_heads_of("llava", 64, packed=True)
    given = on_gpu(asked("llava", padded=False), torch.bfloat16)
    ids = given["input_ids"][:1, -4:].repeat(count, 1)
    ids[:, -1] = torch.arange(count, device="cuda") + 8
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    captured, eager = Generator(model), Generator(model, capture=False)
    for arguments in (GREEDY, SAMPLED, GREEDY):
        said = []
        for generator in (captured, eager):
            torch.manual_seed(5)
            said.append(generator.generate(**inputs, max_new_tokens=NEW, **arguments))
        assert torch.equal(*said)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_our_layers_compiled(kind: str) -> None:
    model = with_heads_of(kind, 64, packed=True)
    inputs = on_gpu(asked(kind), torch.bfloat16)
    usual = logits_of(Generator(model).generate, inputs)
    ours = logits_of(Generator(model, layers="grace", compile=True).generate, inputs)
    noise = (usual - logits_of(model.generate, inputs)).abs().max()
    assert (ours - usual).abs().max() <= 4 * noise + 0.02 * usual.abs().max()


@pytest.mark.parametrize("options", [{}, {"prefill_step": 64}], ids=["", "prefill"])
def test_memory_is_that_of_the_largest_batch(options: dict[str, Any]) -> None:
    model: Any = made("llava", packed=True).bfloat16().cuda()
    inputs = on_gpu(asked("llava"), torch.bfloat16)
    generator = Generator(model, **options)
    for _ in range(3):
        generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.cuda.memory_allocated() == before
