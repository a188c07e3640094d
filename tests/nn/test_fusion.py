"""Fused layers: the same numbers, the same state dict, and a way back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from oracle import assert_accurate
from torch import Tensor, nn
from torch.nn import functional as F

import grace
from grace.nn import (
    FakeQuantLinear,
    FusedLinear,
    FusedMLP,
    PackedLinear,
    PackedPart,
    fused_linear,
)
from grace.nn.fusion import fuse, unfusable, unfuse

TOKENS = torch.arange(3, 27).view(2, 12)


def layer_of(
    rows: int, columns: int = 128, bits: int = 4, group_size: int = 32, bias: bool = True
) -> PackedLinear:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    groups = 1 if group_size == -1 else columns // group_size
    scales = (torch.rand(rows, groups) * 0.1 + 1e-3).div(2 ** (bits - 4)).bfloat16()
    return PackedLinear.from_codes(
        codes, scales, torch.randn(rows) if bias else None, bits, group_size
    )


class Attention(nn.Module):
    """Projections in any order, as attentions call them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layers

    def forward(self, x: Tensor, order: str = "qkv") -> dict[str, Tensor]:
        return {name: self.get_submodule(f"{name}_proj")(x) for name in order}


class MLP(nn.Module):
    """A SiLU-gated MLP whose forward and activation a test may change."""

    def __init__(
        self,
        rows: int = 72,
        columns: int = 128,
        bits: int = 4,
        group_size: int = 32,
        bias: bool = False,
        act_fn: Callable[[Tensor], Tensor] = F.silu,
        up_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = layer_of(rows, columns, bits, group_size, bias)
        self.up_proj = layer_of(up_rows or rows, columns, bits, group_size, not bias)
        self.down_proj = nn.Linear(rows, 16).requires_grad_(False)
        self.act_fn = act_fn
        self.width = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """What `fuse` takes: a module with an attention and an MLP in it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.eval()


def attention_of(*sizes: int, biases: str = "", **options: Any) -> Attention:
    sizes = sizes or (80, 24, 8)
    layers = zip("qkv", sizes, strict=True)
    return Attention(*(layer_of(size, bias=name in biases, **options) for name, size in layers))


def packed(make: Callable[[], Any], bits: int = 4) -> Any:
    model = make()
    grace.quantize(model, bits=bits, group_size=32)
    grace.pack(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """out_features of the products that fused layers compute."""
    made: list[int] = []
    original = fused_linear.dequant_gemm

    def counted(*arguments: Any, **options: Any) -> Tensor:
        made.append(options["out_features"])
        return original(*arguments, **options)

    monkeypatch.setattr(fused_linear, "dequant_gemm", counted)
    return made


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", models.ALL)
def test_a_fused_model_is_as_accurate(name: str, bits: int):
    model = packed(models.ALL[name], bits)
    exact = logits(copy.deepcopy(model).double())
    before, before_halves = logits(model), logits(copy.deepcopy(model).bfloat16())
    names = fuse(model)
    assert [n.rpartition(".layers.")[2] for n in names] == [
        f"{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")
    ]
    assert unfusable(model) == {}
    assert fuse(model) == []
    assert_accurate(logits(model), exact, before)
    assert_accurate(logits(copy.deepcopy(model).bfloat16()), exact, before_halves)


@pytest.mark.parametrize("name", models.ALL)
def test_a_fused_model_is_saved_as_ever(name: str, tmp_path: Path):
    model = packed(models.ALL[name])
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    fuse(model)
    assert_same_state(model.state_dict(), state)
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        written = [(tmp_path / when / file).read_bytes() for when in ("before", "after")]
        assert written[0] == written[1], file


def test_a_fused_model_is_exported_and_verified(tmp_path: Path):
    model = packed(models.qwen2)
    fuse(model)
    certificate = grace.export(model, tmp_path / "out")
    assert certificate.ok
    assert certificate.quantized_layers == 14


@pytest.mark.parametrize("name", models.ALL)
def test_unfuse_gives_the_model_back(name: str):
    model = packed(models.ALL[name])
    kinds = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    state, before = model.state_dict(), logits(model)
    names = fuse(model)
    assert any(isinstance(m, FusedMLP) for m in model.modules())
    assert unfuse(model) == names
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same_state(model.state_dict(), state)
    assert torch.equal(logits(model), before)
    assert unfuse(model) == []


def test_a_fused_model_loads_a_state_dict():
    model, other = packed(models.qwen2), packed(models.qwen2)
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, PackedLinear):
                codes, scales = layer.unpack()
                layer._take(*grace.packing.pack(-1 - codes, 2 * scales, 4))
                if layer.bias is not None:
                    layer.bias.add_(1)
    expected = logits(other)
    assert not torch.equal(expected, logits(model))
    fuse(model)
    model.load_state_dict(other.state_dict())
    assert_same_state(model.state_dict(), other.state_dict())
    torch.testing.assert_close(logits(model), expected)
    lost = "model.layers.0.self_attn.q_proj.weight_scale"
    state = {name: tensor for name, tensor in other.state_dict().items() if name != lost}
    with pytest.raises(RuntimeError, match=lost):
        model.load_state_dict(state)


def test_copies_are_models_of_their_own():
    model = packed(models.qwen2)
    fuse(model)
    expected = logits(model)
    other = copy.deepcopy(model)
    attention = other.model.layers[0].self_attn
    assert attention.q_proj.fused is attention.qkv_proj
    assert attention.qkv_proj is not model.model.layers[0].self_attn.qkv_proj
    unfuse(model)
    assert torch.equal(logits(other), expected)
    assert len(unfuse(other)) == 4
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks


def test_generates_the_same_tokens_with_a_cache():
    model = packed(models.qwen3_vl)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(TOKENS, **options)
    fuse(model)
    assert torch.equal(model.generate(TOKENS, **options), before)


def test_hidden_states_and_attentions_are_still_recorded():
    model = packed(models.qwen2)
    model.set_attn_implementation("eager")
    fuse(model)
    out = model(input_ids=TOKENS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2


def test_pack_and_accelerate_fuse_when_asked_to():
    model = models.qwen2()
    names = grace.quantize(model, group_size=32)
    assert grace.pack(model, fuse=True) == names
    assert sum(isinstance(m, FusedLinear) for m in model.modules()) == 4
    assert not any(isinstance(m, FusedLinear) for m in packed(models.qwen2).modules())
    dense = models.qwen2()
    assert grace.accelerate(dense, fuse=True) == []
    assert not any(isinstance(m, FusedLinear) for m in dense.modules())


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", ["", "qkv", "k"])
@pytest.mark.parametrize("group_size", [32, 24, -1])
@pytest.mark.parametrize("sizes", [(80, 24, 8), (64, 64, 64), (70, 1, 3), (128, 64, 20)])
@pytest.mark.parametrize("bits", [4, 8])
def test_parts_are_the_layers_bit_for_bit(bits: int, sizes, group_size: int, biases: str):
    attention = attention_of(
        *sizes, biases=biases, columns=96, bits=bits, group_size=group_size
    ).eval()
    state = attention.state_dict()
    weights = [layer.dequantize() for layer in attention.children()]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, 96, dtype=dtype)
        before = attention(x)
        assert fuse(attention) == [""]
        assert all(isinstance(attention.get_submodule(f"{n}_proj"), PackedPart) for n in "qkv")
        after = attention(x)
        for name in "qkv":
            assert torch.equal(after[name], before[name])
            assert torch.equal(attention.get_submodule(f"{name}_proj")(x), before[name])
        assert_same_state(attention.state_dict(), state)
        for layer, weight in zip(attention.children(), weights, strict=False):
            assert torch.equal(layer.dequantize(), weight)
        unfuse(attention)
    assert_same_state(attention.state_dict(), state)


def test_one_product_serves_all_three(calls: list[int]):
    attention = attention_of().eval()
    x = torch.randn(4, 128)
    expected = attention(x)
    fuse(attention)
    for order in ("qkv", "vkq", "kvq"):
        calls.clear()
        out = attention(x, order)
        assert calls == [112]
        assert all(torch.equal(out[name], expected[name]) for name in "qkv")
        assert attention.qkv_proj._shared is None
    held: list[object] = []
    attention.v_proj.register_forward_hook(lambda *_: held.append(attention.qkv_proj._shared))
    attention(x)
    assert held == [None], "the product is kept though every layer has its part"


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_stale_is_given(calls: list[int], inference: bool):
    attention = attention_of().eval()
    alone = copy.deepcopy(attention)
    fuse(attention)
    with torch.inference_mode(inference):
        x, other = torch.randn(4, 128), torch.randn(4, 128)
        # Called by themselves, layers keep nothing: x may be written to in between.
        first = attention.q_proj(x)
        assert attention.qkv_proj._shared is None
        assert torch.equal(first, alone.q_proj(x))
        x.mul_(2)
        assert torch.equal(attention.k_proj(x), alone.k_proj(x))
        # In a call of the attention, another x gets what is its own, and calls can end anyhow.
        for order in ("q", "qk", "qqkv", "kq"):
            attention(x, order)
            assert attention.qkv_proj._shared is None
            out = attention(other)
            assert all(torch.equal(out[n], alone(other)[n]) for n in "qkv")
        with pytest.raises(AttributeError, match="z_proj"):
            attention(x, "qz")
        x.add_(1)
        assert attention.qkv_proj._shared is None
        assert torch.equal(attention.k_proj(x), alone.k_proj(x))


class Writes(Attention):
    """Changes its input between projections, and projects something else."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q = self.q_proj(x)
        x.add_(1)
        return q, self.v_proj(x), self.k_proj(-x)


def test_a_product_is_not_shared_over_a_change_of_its_input():
    attention = Writes(*attention_of().children()).eval()
    alone = copy.deepcopy(attention)
    fuse(attention)
    x = torch.randn(4, 128)
    for part, expected in zip(attention(x.clone()), alone(x.clone()), strict=True):
        assert torch.equal(part, expected)


def test_a_part_adds_a_residual():
    attention = attention_of().eval()
    x, residual = torch.randn(4, 128), torch.randn(4, 24)
    expected = attention.k_proj(x, residual)
    fuse(attention)
    torch.testing.assert_close(attention.k_proj(x, residual), expected)
    assert not torch.equal(attention.k_proj(x), expected)


def test_other_features_are_refused():
    attention = attention_of(columns=96, group_size=-1).eval()
    fuse(attention)
    with pytest.raises(ValueError, match="FusedLinear: x must have 96 features, got 97"):
        attention(torch.randn(2, 97))


def test_scales_keep_their_dtype_when_the_model_is_cast():
    layer = Layer(attention=attention_of(biases="q"), mlp=MLP())
    fuse(layer)
    layer.half()
    for fused in (layer.attention.qkv_proj, layer.mlp.gate_up_proj):
        assert fused.scales.dtype == torch.bfloat16
        assert fused.bias.dtype == torch.float16
    assert layer.to("meta").attention.qkv_proj.qweight.is_meta


def test_there_is_one_copy_of_every_weight():
    layer = Layer(attention=attention_of(128, 64, 64), mlp=MLP(rows=128))

    def held() -> int:
        tensors = [*layer.parameters(), *layer.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors if t.dtype == torch.int32)

    before = held()
    gone = [weakref.ref(m.qweight) for m in layer.modules() if isinstance(m, PackedLinear)]
    assert len(fuse(layer)) == 2
    assert [ref() for ref in gone] == [None] * 5
    assert held() == before


def test_compiles_into_one_product_a_layer():
    layer = Layer(attention=attention_of(), mlp=MLP())
    x = torch.randn(4, 128)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return (*layer.attention(x).values(), layer.mlp(x))

    fuse(layer)
    expected = run(x)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for part, same in zip(compiled(x), expected, strict=True):
        assert torch.equal(part, same)
    (graph,) = graphs
    op = torch.ops.grace.dequant_gemm.default
    assert sum(node.target is op for node in graph.graph.nodes) == 2
    assert layer.attention.qkv_proj._shared is None


@pytest.mark.gpu
def test_cuda_graphs_replay_fused_layers():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    layer = Layer(attention=attention_of(), mlp=MLP()).cuda().bfloat16()
    layer.mlp.down_proj = nn.Identity()  # not ours to compare
    fuse(layer)
    x = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        return (*layer.attention(x).values(), layer.mlp(x))

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(3):
            x.normal_()
            graph.replay()
            for part, expected in zip(captured, run(), strict=True):
                assert torch.equal(part, expected)


# --- MLP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", [32, 24, -1])
@pytest.mark.parametrize("rows", [8, 72, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fused_mlp_is_as_accurate(bits: int, rows: int, group_size: int, bias: bool):
    layer = Layer(mlp=MLP(rows, 96, bits, group_size, bias))
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(2, 9, 96)
    exact = copy.deepcopy(layer.mlp).double()(x.double())
    own = [layer.mlp.gate_proj(x), layer.mlp.up_proj(x)]
    for dtype in (torch.float32, torch.bfloat16):
        layer.mlp.down_proj.to(dtype)
        inputs = x.to(dtype)
        exact = copy.deepcopy(layer.mlp).double()(inputs.double())
        before = layer.mlp(inputs)
        assert fuse(layer) == ["mlp"]
        assert layer.mlp.width == rows
        assert_accurate(layer.mlp(inputs), exact, before)
        unfuse(layer)
    fuse(layer)
    for part, expected in zip((layer.mlp.gate_proj, layer.mlp.up_proj), own, strict=True):
        assert torch.equal(part(x), expected)
    layer.mlp.down_proj.float()
    for name, tensor in layer.state_dict().items():
        if "down_proj" not in name:
            assert torch.equal(tensor, state[name]), name


def test_large_layers_are_interleaved_in_blocks(monkeypatch: pytest.MonkeyPatch):
    whole = Layer(mlp=MLP(rows=200))
    blocks = copy.deepcopy(whole)
    fuse(whole)
    monkeypatch.setattr(fused_linear, "_CHUNK", 64 * 128)  # one tile of rows
    fuse(blocks)
    for name in ("qweight", "scales", "bias"):
        ours, expected = (getattr(m.mlp.gate_up_proj, name) for m in (blocks, whole))
        assert torch.equal(ours, expected), name


class Other(MLP):
    """An MLP with another forward."""

    def __init__(self, other: Callable[[MLP, Tensor], Tensor]) -> None:
        super().__init__(rows=128)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self, x)


OTHER_FORWARDS: dict[str, Callable[[MLP, Tensor], Tensor]] = {
    "scaled": lambda m, x: m.down_proj(F.silu(m.gate_proj(x) * 2) * m.up_proj(x)),
    "swapped": lambda m, x: m.down_proj(m.gate_proj(x) * F.silu(m.up_proj(x))),
    "residual": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)) + x[..., :16],
    "no gate": lambda m, x: m.down_proj((F.silu(x) * m.up_proj(x), m.gate_proj(x))[0]),
    "gate twice": lambda m, x: m.down_proj((F.silu(g := m.gate_proj(x)) * g, m.up_proj(x))[0]),
    "chained": lambda m, x: m.down_proj((s := F.silu(m.gate_proj(x))) * m.up_proj(s)),
    "sum": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) + m.up_proj(x)),
    "not down": lambda m, x: (h := F.silu(m.gate_proj(x)) * m.up_proj(x), m.down_proj(h))[0],
    "branches": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)) if x.any() else x,
}


@pytest.mark.parametrize("name", OTHER_FORWARDS)
def test_mlps_of_another_forward_stay(name: str):
    layer = Layer(mlp=Other(OTHER_FORWARDS[name]))
    assert "forward must be down_proj(silu(gate_proj(x)) * up_proj(x))" in unfusable(layer)["mlp"]
    assert fuse(layer) == []
    swiglu = Other(lambda m, x: m.down_proj(m.up_proj(x) * F.silu(m.gate_proj(x))))
    assert unfusable(Layer(mlp=swiglu)) == {}


def test_silu_may_be_written_in_several_ways():
    for act_fn in (F.silu, nn.SiLU(), transformers.activations.ACT2FN["silu"]):
        layer = Layer(mlp=MLP(act_fn=act_fn))
        assert fuse(layer) == ["mlp"]


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def trained() -> FakeQuantLinear:
    return FakeQuantLinear(128, 24, bits=4, group_size=32)


def training(layer: nn.Module) -> nn.Module:
    return layer.train()


def wrapped(layer: nn.Module) -> nn.Module:
    layer.forward = layer.forward  # type: ignore[method-assign] # as offloading does
    return layer


class Sharded(Tensor):
    """Stands for a tensor that is spread over ranks."""


def sharded(layer: PackedLinear) -> PackedLinear:
    layer.qweight = layer.qweight.as_subclass(Sharded)
    return layer


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (lambda: layer_of(24, bits=8), "bits must be the same, got q_proj 4, k_proj 8, v_proj 4"),
        (lambda: layer_of(24, group_size=64), "group_size must be the same, got q_proj 32"),
        (lambda: layer_of(24, columns=64), "in_features must be the same, got q_proj 128"),
        (lambda: nn.Linear(128, 24), "k_proj must be a PackedLinear, got Linear"),
        (trained, "k_proj must be a PackedLinear, got FakeQuantLinear"),
        (lambda: hooked(layer_of(24)), "k_proj must have no hooks and its own forward"),
        (lambda: wrapped(layer_of(24)), "k_proj must have no hooks and its own forward"),
        (lambda: sharded(layer_of(24, bias=False)), "k_proj must hold whole tensors, got Sharded"),
        (lambda: layer_of(24).to("meta"), "k_proj must be in memory"),
        (lambda: PackedLinear(128, 24, group_size=32).eval(), "k_proj must be in memory"),
        (lambda: layer_of(24).half(), "dtype of bias must be the same"),
    ],
)
def test_attentions_that_cannot_be_fused_are_told_of(key, reason: str, caplog):
    layer = Layer(attention=Attention(layer_of(80), nn.Identity(), layer_of(8)))
    layer.attention.k_proj = key()
    before = dict(layer.named_modules())
    assert list(unfusable(layer)) == ["attention"]
    assert reason in unfusable(layer)["attention"]
    with caplog.at_level("INFO", logger="grace.nn.fusion"):
        assert fuse(layer) == []
    assert f"fuse leaves attention as it is: {unfusable(layer)['attention']}" in caplog.text
    assert dict(layer.named_modules()) == before


def test_other_scales_are_told_of():
    attention = attention_of()
    codes, scales = attention.v_proj.unpack()
    attention.v_proj = PackedLinear.from_codes(codes, scales.float(), None, 4, 32)
    assert "dtype of scales must be the same" in unfusable(attention.eval())[""]


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (lambda: MLP(act_fn=F.gelu), "forward must be down_proj"),
        (lambda: MLP(rows=20), "as many rows, a multiple of 8, got 20 and 20"),
        (lambda: MLP(up_rows=80), "as many rows, a multiple of 8, got 72 and 80"),
        (lambda: hooked(MLP()), "the MLP must have no hooks"),
    ],
)
def test_mlps_that_cannot_be_fused_are_told_of(mlp, reason: str):
    layer = Layer(mlp=mlp())
    before = dict(layer.named_modules())
    assert reason in unfusable(layer)["mlp"]
    assert fuse(layer) == []
    assert dict(layer.named_modules()) == before


def test_more_reasons_to_leave_an_mlp():
    layer = Layer(mlp=MLP())
    layer.mlp.scale = nn.Parameter(torch.ones(1))
    assert "no tensors of its own" in unfusable(layer)["mlp"]
    assert "must be a submodule" in unfusable(MLP().eval())[""]
    layer = Layer(mlp=MLP()).train()
    assert "gate_proj must be in eval mode" in unfusable(layer)["mlp"]
    layer = Layer(attention=attention_of())
    layer.attention.qkv_proj = nn.Identity()
    assert "qkv_proj must be a free name" in unfusable(layer)["attention"]


def test_dense_modules_are_no_candidates():
    layer = Layer(attention=Attention(*(nn.Linear(8, 8) for _ in range(3))))
    assert unfusable(layer) == {}
    assert fuse(layer) == []
