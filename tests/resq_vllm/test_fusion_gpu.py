"""The compiler pass on a decoder layer's graph: what it puts in place, what it leaves alone, and the same results.

``resq::linear_quantized`` has CUDA kernels alone; here the reference implements it for the CPU.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.pattern_matcher as patterns
import torch.nn.functional as F
import vllm.ir.ops  # noqa: F401  (registers RMSNorm's ops)
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._subclasses.fake_tensor import FakeTensorMode

from resq_vllm import fusion_gpu, ops, reference
from resq_vllm.formats.activations import activation_layout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.fusion_gpu import FuseQuantization, fuse, install
from resq_vllm.hadamard import hadamard_matrix
from resq_vllm.vllm_api import CompilationMode
from tests.cuda_platform.fake import Op

HIDDEN, FFN, TOKENS, EPSILON = 128, 192, 6, 1e-5
BF16 = torch.bfloat16


@dataclass
class Layer:
    """A linear layer of random weights, as ``resq::linear`` takes it."""

    plan: LinearPlan
    outputs: int
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        low, high = self.plan.part_columns
        self.low = torch.randint(-8, 8, (self.outputs, low), generator=g, dtype=torch.int8)
        self.high = torch.randint(-128, 128, (self.outputs, high), generator=g, dtype=torch.int8)
        self.scales = torch.rand(2, self.outputs, generator=g) / 100
        packed_low = ((self.low[:, 0::2] & 15) | (self.low[:, 1::2] << 4)).to(torch.uint8)
        arguments = (packed_low, self.high if high else None, 4, self.outputs, self.plan.flat_segments())
        self.packed, self.sums = ops.pack_weight(*arguments)
        k = self.plan.hadamard_k
        self.dense = hadamard_matrix(k).float() if k > 1 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.packed, self.scales, self.sums, None)
        lists = (self.plan.flat_segments(), list(self.plan.group_bits))
        return torch.ops.resq.linear(x, *weight, self.outputs, *lists, self.plan.hadamard_groups, self.dense)


QKV = Layer(linear_plan(LinearSite(low=112, high=16), HIDDEN, 16), 160, 1)
GATE_UP = Layer(linear_plan(LinearSite(low=112, high=16), HIDDEN, 16), 2 * FFN, 2)
DOWN = Layer(
    linear_plan(LinearSite(low=FFN, high=0, scales="block", act_low_bits=8, hadamard_groups=2), FFN, 16), HIDDEN, 3
)
O_PROJ = Layer(linear_plan(LinearSite(low=112, high=16, scales="head", order="heads"), HIDDEN, 16), HIDDEN, 5)
BY_PACKED = {layer.packed.data_ptr(): layer for layer in (QKV, GATE_UP, DOWN, O_PROJ)}
NORM_WEIGHT = 1 + torch.randn(HIDDEN, generator=torch.Generator().manual_seed(4)).to(BF16) / 8


@pytest.fixture(scope="module", autouse=True)
def linear_on_cpu() -> Iterator[None]:
    """``linear_quantized`` for the CPU, by reference.linear_integer."""

    def run(
        codes: Any, scale: Any, zero: Any, packed: Any, scales: Any, wsum: Any, bias: Any, n: int, segments: Any,
        group_bits: Any, weight_group: int, dtype: torch.dtype, raw_run: int = -1, kernel: str = "", splits: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        layer = BY_PACKED[packed.data_ptr()]
        rows = activation_layout(tuple(segments), tuple(group_bits), layer.plan.hadamard_groups, weight_group, False)
        integers = reference.linear_integer(rows.unpack(codes), zero, layer.low, layer.high, layer.plan)
        y = torch.zeros(len(codes), n)
        for part, integer in zip(layer.plan.runs, integers, strict=True):
            y = y + integer.float() * (scale[:, part.group : part.group + 1] * layer.scales[part.scale_row])
        return y.to(dtype)

    library = torch.library.Library("resq", "IMPL", "CPU")
    library.impl("linear_quantized", run)
    yield
    library._destroy()


def add_norm(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, NORM_WEIGHT, EPSILON, None)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


def piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies between the attentions of two decoder layers, o_proj left out."""
    hidden, residual = add_norm(x, residual)
    hidden = DOWN(silu_mul(GATE_UP(hidden)))
    hidden, residual = add_norm(hidden, residual)
    return QKV(hidden), residual


def norm_after_o_piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Begins with a linear layer that reads the attention's output, which nothing computes before it."""
    hidden, residual = add_norm(O_PROJ(x), residual)
    return QKV(hidden), residual


def first_piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return QKV(torch.ops.vllm_ir.rms_norm(x, NORM_WEIGHT, EPSILON, None)), residual


def low_rank_piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, residual = add_norm(x, residual)
    return QKV(hidden) + hidden[:, :1], residual


def part_norm_piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return QKV(torch.ops.vllm_ir.rms_norm(x, NORM_WEIGHT, EPSILON, HIDDEN // 2)), residual


def weightless_piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return QKV(torch.ops.vllm_ir.rms_norm(x, None, EPSILON, None)), residual


def swapped_piece(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU of the second half: not what the fused op computes."""
    both = GATE_UP(x)
    return DOWN(F.silu(both[..., FFN:]) * both[..., :FFN]), residual


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(TOKENS, HIDDEN, generator=g).to(BF16), torch.randn(TOKENS, HIDDEN, generator=g).to(BF16)


def traced(function: Callable[..., Any]) -> fx.GraphModule:
    """As inductor hands graphs to a post-grad pass: functional, decomposed, with fake values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(TOKENS, HIDDEN, dtype=BF16)
        return patterns.fwd_only(function, [x, torch.empty_like(x)])


def targets(graph: fx.Graph) -> list[Any]:
    return [node.args[0] if node.target is auto_functionalized else node.target for node in graph.nodes]


def test_norms_and_activation_of_a_layer_are_fused() -> None:
    graph = traced(piece).graph
    assert fuse(graph) == (2, 1)
    found = targets(graph)
    assert found.count(torch.ops.resq.rms_norm_quantize.default) == 2
    assert found.count(torch.ops.resq.silu_mul_quantize.default) == 1
    assert found.count(torch.ops.resq.linear_quantized.default) == 3
    for gone in (
        torch.ops.resq.linear.default,
        torch.ops.vllm_ir.fused_add_rms_norm.default,
        torch.ops.aten.exp.default,
    ):
        assert gone not in found


def test_every_node_that_is_put_in_has_the_value_of_what_it_replaces() -> None:
    before, after = traced(piece), traced(piece)
    fuse(after.graph)
    outputs = [[node.meta["val"] for node in next(iter(reversed(g.graph.nodes))).args[0]] for g in (before, after)]
    for old, new in zip(*outputs, strict=True):
        assert (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    assert all("val" in node.meta for node in after.graph.nodes if node.op == "call_function")


def test_first_norm_has_no_residual() -> None:
    graph = traced(first_piece).graph
    assert fuse(graph) == (1, 0)
    (made,) = [node for node in graph.nodes if node.target is auto_functionalized]
    assert made.kwargs["residual"] is None


@pytest.mark.parametrize("function", [low_rank_piece, part_norm_piece, weightless_piece, swapped_piece])
def test_what_has_no_fused_op_is_left_alone(function: Callable[..., Any]) -> None:
    graph = traced(function).graph
    before = targets(graph)
    assert fuse(graph) == (0, 0)
    assert targets(graph) == before


@pytest.mark.parametrize("function", [piece, first_piece])
def test_compiled_with_the_pass_the_results_are_the_same(function: Callable[..., Any]) -> None:
    fused_counts: list[tuple[int, int]] = []

    class Counting(FuseQuantization):
        def __call__(self, graph: fx.Graph) -> None:
            fused_counts.append(fuse(graph))

    torch._dynamo.reset()
    options: dict[str, Any] = {"post_grad_custom_post_pass": Counting(), "fx_graph_cache": False}
    compiled = torch.compile(function, options=options, fullgraph=True)
    expected, kept = function(*inputs())
    given = inputs()
    found, residual = compiled(*given)
    assert fused_counts == [(2, 1)] or (function is first_piece and fused_counts == [(1, 0)])
    # Inductor's and the eager bf16 may differ in a rounding, which 4-bit codes turn into steps.
    for ours, theirs in ((found, expected), (residual, kept)):
        assert F.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0) > 0.999
    # The op changes its residual in place: not the caller's.
    assert all(torch.equal(a, b) for a, b in zip(given, inputs(), strict=True))


def test_vllm_s_pass_manager_leaves_what_was_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clean-up, lowering and functionalization run after ours, and inductor compiles what they leave."""
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.config.utils import Range

    left: list[list[Any]] = []

    class Recording(PostGradPassManager):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            left.append(targets(graph))

    # It looks up ops of vLLM's CUDA extension.
    monkeypatch.setattr(torch.ops, "_C", Op("_C"), raising=False)
    config, manager = VllmConfig(device_config=DeviceConfig(device="cpu")), Recording()
    manager.configure(config)
    manager.add(FuseQuantization())
    torch._dynamo.reset()
    options: dict[str, Any] = {"post_grad_custom_post_pass": manager, "fx_graph_cache": False}
    with set_current_vllm_config(config), pass_context(Range(1, 8192)):
        found, residual = torch.compile(piece, options=options, fullgraph=True)(*inputs())
    (found_ops,) = left
    assert found_ops.count(torch.ops.resq.rms_norm_quantize.default) == 2
    assert found_ops.count(torch.ops.resq.silu_mul_quantize.default) == 1
    expected, kept = piece(*inputs())
    for ours, theirs in ((found, expected), (residual, kept)):
        assert F.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0) > 0.999


def engine(mode: Any = CompilationMode.VLLM_COMPILE, present: Any = None) -> Any:
    passes = {} if present is None else {"post_grad_custom_post_pass": present}
    return SimpleNamespace(compilation_config=SimpleNamespace(mode=mode, inductor_compile_config=passes))


def test_pass_is_installed_once() -> None:
    config = engine()
    said = install(config)
    assert said == "fused into quantization where the compiled graph shows them"
    installed = config.compilation_config.inductor_compile_config["post_grad_custom_post_pass"]
    assert isinstance(installed, FuseQuantization)
    assert install(config) == said
    assert config.compilation_config.inductor_compile_config["post_grad_custom_post_pass"] is installed


def test_without_compilation_or_beside_another_pass_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install(engine(CompilationMode.NONE)) == "not fused into quantization, since torch.compile is off"
    other = engine(present=SimpleNamespace())
    assert "since SimpleNamespace has the place of a compiler pass" in install(other)
    monkeypatch.setenv("RESQ_FUSE", "0")
    config = engine()
    assert install(config) == "not fused into quantization, as RESQ_FUSE=0 says"
    assert not config.compilation_config.inductor_compile_config


def test_pass_is_a_key_of_the_compile_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    one = FuseQuantization()
    before = one.uuid()
    assert before == deepcopy(one).uuid() == pickle.loads(pickle.dumps(one)).uuid()
    changed = tmp_path / "fusion_gpu.py"
    changed.write_text("another source")
    monkeypatch.setattr(fusion_gpu, "__file__", str(changed))
    assert FuseQuantization().uuid() != before


def test_what_was_fused_and_what_was_not_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(fusion_gpu, "log_once", lambda level, message: lines.append(message))
    for function in (piece, norm_after_o_piece, swapped_piece, lambda x, residual: (x + residual, residual)):
        FuseQuantization()(traced(function).graph)
    assert [tuple(map(int, re.findall(r"\d+", line))) for line in lines] == [(2, 1, 0), (1, 0, 1), (0, 0, 2)]
    assert lines[1] == (
        "ResQ: 1 RMSNorm and 0 SiLU·mul fused into quantization in a compiled piece; linear layers in it that "
        "quantize their input in a launch of their own: 1"
    )
