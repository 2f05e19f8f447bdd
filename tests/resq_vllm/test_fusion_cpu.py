"""The graph pass: what it takes in, what it must leave alone, and that vLLM's norm and activation still match it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul

from resq_vllm import fusion_cpu
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from resq_vllm.vllm_api import CompilationMode
from tests.csrc.support import Weights

HIDDEN, INTERMEDIATE, EPSILON = 128, 256, 1e-5
norm = ir.ops.rms_norm.impls["native"].impl_fn
add_norm = ir.ops.fused_add_rms_norm.impls["native"].impl_fn
silu_mul = SiluAndMul.forward_native

Linear = Callable[[torch.Tensor], torch.Tensor]


def layer(columns: int, outputs: int, hadamard_groups: int = 0) -> Linear:
    if hadamard_groups:
        site = LinearSite(low=columns, high=0, scales="block", hadamard_groups=hadamard_groups)
    else:
        site = LinearSite(low=columns - columns // 8, high=columns // 8)
    return Weights(linear_plan(site, columns, 64), outputs, 4, 0).apply_planned


QKV, OUT = layer(HIDDEN, HIDDEN), layer(HIDDEN, HIDDEN)
UP, DOWN = layer(HIDDEN, 2 * INTERMEDIATE), layer(INTERMEDIATE, HIDDEN, 4)
WEIGHT = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


def decoder(x: torch.Tensor, reduce: Linear = lambda y: y) -> torch.Tensor:
    """Two layers as vLLM writes them, the attention left out."""
    y = QKV(norm(x, WEIGHT, EPSILON))
    y, residual = add_norm(reduce(OUT(y)), x, WEIGHT, EPSILON)
    y = DOWN(silu_mul(UP(y)))
    y, residual = add_norm(reduce(y), residual, WEIGHT, EPSILON)
    y = QKV(y)
    y, residual = add_norm(reduce(OUT(y)), residual, WEIGHT, EPSILON)
    y = DOWN(silu_mul(UP(y)))
    return add_norm(reduce(y), residual, WEIGHT, EPSILON)[0]


def compiled(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The names of our ops after the pass, in order, then "attention" for each of vLLM's; and the result."""
    names: list[str] = []

    class Recorded(fusion_cpu.FuseDecoder):
        def __call__(self, graph: Graph) -> None:
            super().__call__(graph)
            graph.lint()
            names.extend(str(node.target).split(".")[1] for node in graph.nodes if "resq." in str(node.target))
            names.extend("attention" for node in graph.nodes if "auto_functionalized" in str(node.target))

        def uuid(self) -> str:
            return ""

    torch.compiler.reset()
    # The second one as vLLM sets it.
    options: dict[str, Any] = {
        fusion_cpu.OPTION: Recorded(),
        "enable_auto_functionalized_v2": False,
        "fx_graph_cache": False,
    }
    return names, torch.compile(function, fullgraph=True, options=options)(*inputs)


def hidden(rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_from_one_attention_to_the_next_all_is_one_op() -> None:
    x = hidden()
    names, y = compiled(decoder, x)
    assert names == ["norm_linear", "between_attentions", "decoder_mlp"]
    torch.testing.assert_close(y, decoder(x), rtol=0.02, atol=0.02)


def test_with_an_all_reduce_between_the_rest_is_fused() -> None:
    x = hidden()
    names, y = compiled(lambda x: decoder(x, lambda y: y * 2), x)
    per_layer = ["norm_linear", "linear_planned", "norm_linear", "silu_linear"]
    assert names == per_layer * 2
    torch.testing.assert_close(y, decoder(x, lambda y: y * 2), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, "norm_linear"), (torch.float32, "linear_planned")])
def test_float16_is_fused_and_float32_is_left_alone(dtype: torch.dtype, expected: str) -> None:
    weight = WEIGHT.to(dtype)
    names, _ = compiled(lambda x: QKV(norm(x, weight, EPSILON)), hidden(dtype=dtype))
    assert names == [expected]


def left_alone(function: Linear, x: torch.Tensor) -> None:
    names, y = compiled(function, x)
    assert set(names) == {"linear_planned"}
    # inductor does not round to bfloat16 in between, so some values fall to another code.
    assert float((y - function(x)).float().norm()) < 0.05 * float(function(x).float().norm())


def test_a_normed_row_that_something_else_reads_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = norm(x, WEIGHT, EPSILON)
        return QKV(y) + y

    left_alone(function, hidden())


def test_a_sum_that_is_read_before_the_layer_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y, residual = add_norm(x, 2 * x, WEIGHT, EPSILON)
        return QKV(y * residual.sum(-1, keepdim=True))

    left_alone(function, hidden())


def test_a_norm_of_part_of_the_row_stays() -> None:
    left_alone(lambda x: QKV(norm(x, WEIGHT, EPSILON, 64)), hidden())


def test_gate_and_up_in_other_order_or_of_two_tensors_stay() -> None:
    x = torch.randn(3, 2 * INTERMEDIATE).bfloat16()
    left_alone(lambda x: DOWN(torch.nn.functional.silu(x[..., INTERMEDIATE:]) * x[..., :INTERMEDIATE]), x)
    left_alone(lambda x: DOWN(torch.nn.functional.silu(x[..., :INTERMEDIATE]) * (x + 1)[..., INTERMEDIATE:]), x)


def test_a_changed_pass_is_another_one_for_the_caches() -> None:
    assert isinstance(fusion_cpu.FuseDecoder().uuid(), str)  # vLLM puts it into JSON
    assert fusion_cpu.FuseDecoder().uuid() == fusion_cpu.FuseDecoder().uuid()


def test_enabling_keeps_a_pass_that_is_configured(caplog: pytest.LogCaptureFixture) -> None:
    compilation = SimpleNamespace(inductor_compile_config={}, mode=CompilationMode.DYNAMO_TRACE_ONCE)
    config = SimpleNamespace(compilation_config=compilation)
    fusion_cpu.install(config)
    fusion_cpu.install(config)
    assert isinstance(config.compilation_config.inductor_compile_config[fusion_cpu.OPTION], fusion_cpu.FuseDecoder)

    def other(graph: Graph) -> Node | None:
        return None

    config.compilation_config.inductor_compile_config[fusion_cpu.OPTION] = other
    logger = logging.getLogger("vllm.resq")
    logger.addHandler(caplog.handler)
    try:
        fusion_cpu.install(config)
    finally:
        logger.removeHandler(caplog.handler)
    assert config.compilation_config.inductor_compile_config[fusion_cpu.OPTION] is other
    assert "are not fused" in caplog.text


def test_nothing_is_installed_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = SimpleNamespace(inductor_compile_config={}, mode=CompilationMode.NONE)
    fusion_cpu.install(SimpleNamespace(compilation_config=compilation))
    compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
    monkeypatch.setenv("RESQ_FUSE", "0")
    fusion_cpu.install(SimpleNamespace(compilation_config=compilation))
    assert compilation.inductor_compile_config == {}
