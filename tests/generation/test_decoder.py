"""Decoder layers of our own ops say what transformers' layers say, and are seven ops a step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
import transformers
from generating import GREEDY, NEW, SAMPLED, asked, both, capturing, logits_of, made, varied
from recorded_graphs import Recorded, waits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grace.generation import Generator, decoder, fitting
from grace.generation.cache import SharedCache, Storage
from grace.generation.layers import replaced
from grace.generation.names import CACHE

LAYERS = families.TEXT["num_hidden_layers"]
TEXTS = {"Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {"head_dim": 16}}


def text_model(kind: str, packed: bool = False, **more: Any) -> Any:
    """A language model alone."""
    config = getattr(transformers, f"{kind}Config")(**families.TEXT, **TEXTS[kind], **more)
    torch.manual_seed(0)
    return varied(getattr(transformers, f"{kind}ForCausalLM")(config), packed)


def text_inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How often our layers called each op, by name."""
    counter: Counter = Counter()

    def counted(name: str) -> Any:
        op = getattr(decoder, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return op(*args, **kwargs)

        return call

    for name in ("rms_norm", "rotary", "decode_attention"):
        monkeypatch.setattr(decoder, name, counted(name))
    return counter


def expected(steps: int) -> dict[str, int]:
    """Of a prompt and as many steps: norms twice a layer, and once behind all."""
    norms = (2 * LAYERS + 1) * (1 + steps)
    return {"rms_norm": norms, "rotary": LAYERS, "decode_attention": LAYERS * steps}


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_logits_of_every_step_are_the_same(kind: str, packed: bool, calls: Counter) -> None:
    """Two rows, one padded on the left."""
    model, inputs = made(kind, packed), asked(kind)
    exact = logits_of(model.generate, inputs)
    ours = logits_of(Generator(model, layers="grace", length_step=16).generate, inputs)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    assert calls == expected(NEW - 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_language_models_alone(kind: str, packed: bool, calls: Counter) -> None:
    model, inputs = text_model(kind, packed), text_inputs()
    generator = Generator(model, layers="grace")
    exact = logits_of(model.generate, inputs)
    torch.testing.assert_close(logits_of(generator.generate, inputs), exact, rtol=1e-5, atol=1e-5)
    assert calls == expected(NEW - 1)
    for arguments in (GREEDY, SAMPLED):
        theirs, ours = both(model, generator, inputs, **arguments)
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl"])
def test_packed_layers_that_are_not_fused(kind: str, calls: Counter) -> None:
    model, inputs = made(kind, packed=True, fuse=False), asked(kind)
    generator = Generator(model, layers="grace")
    for arguments in (GREEDY, SAMPLED):
        calls.clear()
        theirs, ours = both(model, generator, inputs, **arguments)
        assert torch.equal(theirs, ours)
        assert calls == expected(NEW - 1)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_in_bfloat16_they_are_as_near_to_the_truth(kind: str) -> None:
    """Logits in float32 of the same weights, by transformers' layers and by ours in bfloat16."""
    model, inputs = made(kind, packed=True), asked(kind)
    model.bfloat16()
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    ours = logits_of(Generator(model, layers="grace").generate, half)
    theirs = logits_of(model.generate, half)
    exact = logits_of(model.float().generate, inputs)
    error, noise = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert 0 < error <= 1.5 * noise


def test_positions_and_masks_are_those_of_the_step() -> None:
    model, inputs = made("qwen2_vl"), asked("qwen2_vl")
    generator = Generator(model, layers="grace")
    exact = logits_of(generator.generate, inputs)
    (steps,) = generator._sizes.values()
    load = steps.load
    for key in ("position_ids", "attention_mask"):

        def changed(given: Any, rows: int, key: str = key) -> None:
            load(given, rows)
            held = steps._inputs[key]
            held = held["full_attention"] if isinstance(held, dict) else held
            held.mul_(2) if key == "position_ids" else held[..., 5].fill_(False)

        steps.load = changed
        off = (logits_of(generator.generate, inputs) - exact)[1:].abs().amax(dim=(1, 2))
        assert (off > 1e-3).all(), key


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_filled_up_to_a_power_of_two(count: int) -> None:
    model = text_model("Qwen3", packed=True)
    ids = text_inputs()["input_ids"][:1].repeat(count, 1)
    ids[:, -1] = torch.arange(count) + 8
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = Generator(model, layers="grace", length_step=8)
    theirs, ours = both(model, generator, inputs, **GREEDY)
    assert torch.equal(theirs, ours)
    assert next(iter(generator._sizes))[0] == {1: 1, 3: 4}[count]


def test_prompts_of_one_token() -> None:
    model = text_model("Llama")
    inputs = {name: value[:1, -1:] for name, value in text_inputs().items()}
    theirs, ours = both(model, Generator(model, layers="grace"), inputs, **GREEDY)
    assert torch.equal(theirs, ours)


def test_sizes_share_their_memory_and_the_model_is_left_as_it_was() -> None:
    model, large = made("llava", packed=True), asked("llava")
    small = {name: large[name][:1, -4:] for name in ("input_ids", "attention_mask")}
    held = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [model.generate(**given, max_new_tokens=NEW, **GREEDY) for given in (small, large)]
    generator = Generator(model, layers="grace", length_step=8)
    for _ in range(2):
        for given, want in zip((small, large), wanted, strict=True):
            assert torch.equal(generator.generate(**given, max_new_tokens=NEW, **GREEDY), want)
    assert len(generator._sizes) == 2
    assert not any("forward" in vars(module) for module in model.modules())
    state = model.state_dict()
    assert state.keys() == held.keys()
    assert all(torch.equal(state[name], value) for name, value in held.items())
    again = model.generate(**large, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(again, wanted[1])


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_replayed_prompts_and_steps_say_the_same(
    kind: str, recorded_graphs: list[Recorded]
) -> None:
    model, generator = made(kind, packed=True), None
    generator = capturing(model, layers="grace", prefill_step=24, length_step=64)
    for padded in (False, True, False, True):
        inputs = asked(kind, padded)
        for arguments in (GREEDY, SAMPLED):
            theirs, ours = both(model, generator, inputs, **arguments)
            assert torch.equal(theirs, ours), (padded, arguments)
    names = [{c[0].overloadpacket.__name__ for c in graph.calls} for graph in recorded_graphs]
    prompts = [graph for graph, ops in zip(recorded_graphs, names, strict=True) if "rotary" in ops]
    assert [graph.replays for graph in prompts] == [3, 3]  # with a mask and without
    assert sum("decode_attention" in ops for ops in names) == 2  # greedy and sampled
    for graph in prompts:
        attention = [c for c in graph.calls if "scaled_dot" in c[0].overloadpacket.__name__]
        assert len(attention) == LAYERS
    for graph in recorded_graphs:
        assert [c[0] for c in graph.calls if waits(c[0], c[1])] == []


class _Ops(TorchDispatchMode):
    """Names of the ops that are called, but for those that only look at memory otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return result


def test_a_layer_of_a_step_is_seven_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where an op is one call as on a GPU, but for what is put aside here."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)

    def sdpa(query: Tensor, *_: Any, **options: Any) -> Tensor:
        return query.transpose(1, 2).contiguous().transpose(1, 2)  # one call, as laid out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    model: Any = text_model("Qwen3", packed=True).bfloat16()
    layer, cache = model.model.layers[0], SharedCache(1, 2, 32, Storage(), torch.device("meta"))
    layer.to("meta")
    forward = decoder.Layer(layer).forward

    def called(tokens: int, mask: Any) -> list[str]:
        x = torch.empty(2, tokens, 32, dtype=torch.bfloat16, device="meta")
        cos = x.new_empty(2, tokens, 16)
        with torch.no_grad(), _Ops() as ops:
            out = forward(x, position_embeddings=(cos, cos), attention_mask=mask, **{CACHE: cache})
        assert out.shape == x.shape
        return ["sdpa" if name == "clone" else name for name in ops.names]

    called(5, None)  # takes memory
    mlp = ["rms_norm", "dequant_gemm", "dequant_gemm"]
    update = ["copy_", "zero_"] * 2
    attention = ["rms_norm", "dequant_gemm", "rotary", *update, "sdpa", "dequant_gemm"]
    assert called(5, None) == [*attention, *mlp]
    cache.filling = False
    step = called(1, torch.empty(2, 1, 1, 32, dtype=torch.bool, device="meta"))
    assert step == ["rms_norm", "dequant_gemm", "decode_attention", "dequant_gemm", *mlp]


def test_a_step_waits_for_nothing_and_moves_no_buffer() -> None:
    model, inputs = made("qwen3_vl", packed=True), asked("qwen3_vl")
    generator = Generator(model, layers="grace")
    generator.generate(**inputs, max_new_tokens=3, **GREEDY)
    (steps,) = generator._sizes.values()
    assert steps._inputs["attention_mask"].dtype == torch.bool
    places = [tensor.data_ptr() for tensor in steps._state()]
    with generator.stepping(), torch.no_grad(), _Ops() as ops:
        steps.run(choose=True)
    assert ops.names.count("decode_attention") == LAYERS
    assert ops.names.count("index_copy_") == 1  # the tokens
    assert places == [tensor.data_ptr() for tensor in steps._state()]


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_step_says_the_same(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, in one graph."""

    def traced(function: Any, **options: Any) -> Any:
        return compiler(function, dynamic=False, fullgraph=True, backend="aot_eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    model, inputs = made("qwen3_vl", packed, num_hidden_layers=1), asked("qwen3_vl")
    torch._dynamo.reset()
    generator = Generator(model, layers="grace", compile="default")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        theirs, ours = both(model, generator, inputs, **GREEDY)
        assert torch.equal(theirs, ours)
    assert counters["stats"]["unique_graphs"] == 1


# --- what is left to the layers ------------------------------------------------------------------


def test_other_calls_are_the_layers_own(calls: Counter) -> None:
    """Of a cache of another kind, of none, and under autocast."""
    model, inputs = text_model("Llama"), text_inputs()
    for options in ({}, {"use_cache": False}):
        exact = model(**inputs, **options).logits
        with replaced(decoder.replacements(model)[:-1]):
            assert torch.equal(model(**inputs, **options).logits, exact)
    with torch.autocast("cpu", torch.bfloat16):
        generators = [Generator(model, layers=layers) for layers in ("transformers", "grace")]
        theirs, ours = (logits_of(generator.generate, inputs) for generator in generators)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    assert set(calls) <= {"rms_norm"}  # behind the layers
    assert sum(calls.values()) == NEW


def test_attentions_are_the_layers_own(calls: Counter) -> None:
    model = text_model("Llama")
    cache = SharedCache(LAYERS, 1, 16, Storage(), torch.device("cpu"))
    ids = text_inputs()["input_ids"][:1]
    with replaced(decoder.replacements(model)):
        model(ids, **{CACHE: cache}, output_attentions=True)
    assert calls == {"rms_norm": 1}
    with replaced(decoder.replacements(model)):
        model(ids, **{CACHE: cache})
    assert calls == {"rms_norm": 2 * LAYERS + 2, "rotary": LAYERS}


def test_attention_is_given_what_the_layers_own_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache would reach kernels that know of none."""
    seen: list[set[str]] = []
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **options: Any) -> Any:
        seen.append(set(options))
        return usual(*args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    model, ids = text_model("Llama"), text_inputs()["input_ids"][:1]
    caches = (SharedCache(LAYERS, 1, 16, Storage(), torch.device("cpu")) for _ in range(2))
    model(ids, **{CACHE: next(caches)})
    with replaced(decoder.replacements(model)):
        model(ids, **{CACHE: next(caches)})
    assert len(seen) == 2 * LAYERS
    assert {CACHE, "past_key_values"}.isdisjoint(set.union(*seen))
    assert seen[LAYERS:] == seen[:LAYERS]


def test_hooks_of_projections_and_of_layers_run() -> None:
    model, inputs = made("llava", packed=True), asked("llava")
    seen: Counter = Counter()
    layer = model.get_decoder().layers[0]
    for name in ("self_attn.o_proj", "mlp.down_proj", "mlp", ""):
        module = layer.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.update([name]))
    exact = model.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert set(seen.values()) == {NEW}
    seen.clear()
    ours = Generator(model, layers="grace").generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(ours, exact)
    assert set(seen.values()) == {NEW}
    assert len(seen) == 4


def test_hooks_that_collect_outputs_change_nothing() -> None:
    """transformers leaves them in a model that was once asked for hidden states."""
    model, inputs = text_model("Llama", packed=True), text_inputs()
    model(**inputs, output_hidden_states=True)
    assert model.model.layers[0].self_attn._forward_hooks
    theirs, ours = both(model, Generator(model, layers="grace"), inputs, **GREEDY)
    assert torch.equal(theirs, ours)


# --- which models --------------------------------------------------------------------------------


class OtherLayer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """By class another one."""


def _hooked(model: Any) -> None:
    model.model.layers[2].self_attn.register_forward_pre_hook(lambda *_: None)


def _hooked_norm(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)


def _other_class(model: Any) -> None:
    model.model.layers[3].__class__ = OtherLayer


def _own_forward(model: Any) -> None:
    model.model.layers[1].forward = len


def _other_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = nn.RMSNorm(32)


def _float_norms(model: Any) -> None:
    model.bfloat16()
    model.model.norm.float()


def _eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def _fewer(model: Any) -> None:
    del model.model.layers[-1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_hooked, "attention is not as transformers makes it, or has hooks"),
        (_hooked_norm, "norms are not as transformers makes them, or have hooks"),
        (_other_class, "its layers are OtherLayer"),
        (_own_forward, "its layers have a forward of their own"),
        (_other_norm, "norms are not as transformers makes them"),
        (_float_norms, "its norms are torch.float32, and its embedding is torch.bfloat16"),
        (_eager, "its attention is eager, not sdpa"),
        (_fewer, "its language model has 3 layers"),
    ],
)
def test_models_that_do_not_fit(change: Any, why: str) -> None:
    model = text_model("Llama")
    assert fitting.why_not(model) == ""
    change(model)
    assert why in fitting.why_not(model)
    with pytest.raises(ValueError, match=f"layers 'grace' must fit the model, .*{why}"):
        Generator(model, layers="grace")
    assert Generator(model).layers.name == "transformers"


def test_sliding_windows_and_other_families_do_not_fit() -> None:
    config = transformers.MistralConfig(**families.TEXT, sliding_window=4)
    assert "sliding" in fitting.why_not(transformers.MistralForCausalLM(config))
    config = transformers.Gemma2Config(
        **families.TEXT, head_dim=8, layer_types=["full_attention"] * 4
    )
    config.sliding_window = None
    assert fitting.why_not(transformers.Gemma2ForCausalLM(config)) != ""


@pytest.mark.parametrize(
    ("heads", "dtype", "fits"),
    [
        ((2, 1, 64), torch.bfloat16, True),
        ((16, 1, 128), torch.float16, True),
        ((2, 1, 64), torch.float32, False),
        ((2, 1, 32), torch.bfloat16, False),
        ((32, 1, 64), torch.bfloat16, False),
    ],
)
def test_heads_that_a_gpu_takes(heads: tuple[int, int, int], dtype: Any, fits: bool) -> None:
    layer = text_model("Llama").model.layers[0]
    config = layer.self_attn.config
    config.num_attention_heads, config.num_key_value_heads, layer.self_attn.head_dim = heads
    assert (fitting._why_not_heads(layer, torch.device("cuda"), dtype) == "") == fits
    assert fitting._why_not_heads(layer, torch.device("cpu"), dtype) == ""


def test_they_are_the_default_on_a_gpu_where_they_fit(caplog: pytest.LogCaptureFixture) -> None:
    """As a generator asks for them; a model says where it lies."""
    from grace.generation.layers import known_layers

    class OnGpu:
        """A model, by all it says on a GPU."""

        def __init__(self, model: Any) -> None:
            self._model, self.device = model, torch.device("cuda")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

    wide = {"hidden_size": 256, "num_attention_heads": 4}
    sizes = {**families.TEXT, **wide}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16()
    assert known_layers(None, model).name == "transformers"
    on_gpu = OnGpu(model)
    assert known_layers(None, on_gpu).name == "grace"
    assert known_layers(None, on_gpu, "grouped").name == "transformers"
    assert known_layers("transformers", on_gpu).name == "transformers"
    model.float()
    with caplog.at_level(logging.INFO):
        assert known_layers(None, on_gpu).name == "transformers"
    told = "layers are those of transformers: its attention has 4 heads of 64 over 2, torch.float32"
    assert told in caplog.text
    with pytest.raises(ValueError, match=r"attention must be None with layers 'grace'.*'sdpa'"):
        Generator(model, layers="grace", attention="sdpa")
