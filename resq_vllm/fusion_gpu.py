"""A pass over vLLM's compiled graph: RMSNorm (with residual) and SiLU·mul move into the quantization of a linear layer.

vLLM's decoder layers call norm and activation as ops of their own; ``resq::linear`` then reads what they wrote and
quantizes it, in a launch of its own. Where the linear layer is the only reader, this pass puts one op of
:mod:`resq_vllm.fused` and the GEMM on its codes (``resq::linear_quantized``) in their place. A low-rank correction
reads the norm's output as well: its layer stays as it is.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.pattern_matcher as patterns
import torch.nn.functional as F
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._subclasses.fake_tensor import FakeTensorMode

from resq_vllm import fused, quantized_linear  # noqa: F401  (their fake implementations)
from resq_vllm.fusion import SWITCH, switched_off
from resq_vllm.log import log_once
from resq_vllm.vllm_api import CompilationMode, InductorPass, VllmConfig, current_platform

# Arguments of resq::linear, whose last may be left out of a node.
_LINEAR = (
    "x",
    "packed",
    "scales",
    "wsum",
    "bias",
    "n",
    "segments",
    "group_bits",
    "hadamard_groups",
    "hadamard_k",
    "weight_group",
)


def install(config: VllmConfig) -> str:
    """Add the pass to this engine's compilation, before it compiles; what the start-up line says of it.

    Called for every linear layer: a second call changes nothing.
    """
    compilation = config.compilation_config
    if switched_off():
        return f"not fused into quantization, as {SWITCH}=0 says"
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        return "not fused into quantization, since torch.compile is off"
    present = compilation.inductor_compile_config.setdefault(current_platform.pass_key, FuseQuantization())
    if not isinstance(present, FuseQuantization):
        return f"not fused into quantization, since {type(present).__name__} has the place of a compiler pass"
    return "fused into quantization where the compiled graph shows them"


class FuseQuantization(InductorPass):
    """vLLM's pass manager calls it with each compiled piece of the model, functionalized and not yet lowered."""

    def __call__(self, graph: fx.Graph) -> None:
        norms, activations = fuse(graph)
        alone = sum(_is_linear(node) for node in graph.nodes)
        if norms or activations or alone:
            log_once(
                logging.INFO,
                f"ResQ: {norms} RMSNorm and {activations} SiLU·mul fused into quantization in a compiled piece; "
                f"linear layers in it that quantize their input in a launch of their own: {alone}",
            )

    def uuid(self) -> str:
        """Of this file: compiled graphs are cached by it."""
        return str(self.hash_source(Path(__file__).read_text(encoding="utf-8")))


def fuse(graph: fx.Graph) -> tuple[int, int]:
    """Rewrite the graph in place; how many RMSNorm and how many SiLU·mul went into a linear layer."""
    norms = activations = 0
    for node in list(graph.nodes):
        if not _is_linear(node):
            continue
        given = dict(zip(_LINEAR, (*node.args, 0), strict=False)) | dict(node.kwargs)
        x = given["x"]
        if not _is_rows(x) or len(x.users) != 1:
            continue
        if given["hadamard_groups"] == 0 and _fuse_norm(graph, node, given):
            norms += 1
        elif _fuse_activation(graph, node, given):
            activations += 1
    if norms or activations:
        graph.eliminate_dead_code()
        graph.lint()
    return norms, activations


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.resq.linear.default


def _is_rows(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.meta["val"].dim() == 2


def _value(node: fx.Node, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` gives for the arguments' fake tensors, as ``node``'s graph knows them."""
    with node.meta["val"].fake_mode:
        return function(*fx.map_arg(arguments, lambda n: n.meta["val"]))


# --- RMSNorm ----------------------------------------------------------------------------------------------------------
def _fuse_norm(graph: fx.Graph, linear: fx.Node, given: dict[str, Any]) -> bool:
    x = given["x"]
    if x.target is torch.ops.vllm_ir.rms_norm.default:
        norm, residual = x, None
        row, weight, epsilon, *rest = norm.args
    elif x.target is operator.getitem and x.args[1] == 0 and _is_add_norm(x.args[0]):
        norm = x.args[0]
        row, residual, weight, epsilon, *rest = norm.args
    else:
        return False
    # A norm over part of the row, one without weight, and one of another dtype have no fused op.
    if any(extra is not None for extra in rest) or norm.kwargs or not isinstance(weight, fx.Node) or not _is_rows(row):
        return False
    if weight.meta["val"].dtype != row.meta["val"].dtype:
        return False
    op = torch.ops.resq.rms_norm_quantize.default
    arguments = (row, residual, weight, epsilon, given["segments"], given["group_bits"], given["weight_group"], False)
    names = ("x", "residual", "weight", "epsilon", "segments", "group_bits", "weight_group", "nibbles")
    with graph.inserting_before(norm):
        made = graph.call_function(auto_functionalized, (op,), dict(zip(names, arguments, strict=True)))
        codes = _value(row, op, *arguments)
        total = None if residual is None else _value(row, torch.empty_like, row)
        made.meta["val"] = (*codes, total)
        quantized = _items(graph, made, 3)
        if residual is not None:
            for after in [n for n in norm.users if n.args[1] == 1]:
                replaced = graph.call_function(operator.getitem, (made, 3))
                replaced.meta["val"] = total
                after.replace_all_uses_with(replaced)
    _replace_linear(graph, linear, given, quantized)
    return True


def _is_add_norm(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.vllm_ir.fused_add_rms_norm.default


# --- SiLU·mul ---------------------------------------------------------------------------------------------------------
def _silu_mul(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


@cache
def _silu_mul_pattern(width: int, dtype: torch.dtype) -> Any:
    """What inductor makes of vLLM's SiluAndMul for rows [gate | up] of ``width`` elements."""
    with torch._guards.tracing(None), FakeTensorMode():
        return patterns.fx_to_pattern(patterns.fwd_only(_silu_mul, [torch.empty(5, width, dtype=dtype)]))


def _fuse_activation(graph: fx.Graph, linear: fx.Node, given: dict[str, Any]) -> bool:
    x = given["x"]
    value = x.meta["val"]
    match = _silu_mul_pattern(2 * value.shape[1], value.dtype).match(x)
    if not match:
        return False
    gate_up = match.kwargs["x"]
    if not _is_rows(gate_up) or gate_up.meta["val"].shape[1] != 2 * value.shape[1]:
        return False
    op = torch.ops.resq.silu_mul_quantize.default
    lists = (given["segments"], given["group_bits"], given["hadamard_groups"])
    # The fake implementation is that of quantize_pack: it reads the width from the plan, the rows from the input.
    arguments = (gate_up, *lists, given["hadamard_k"], given["weight_group"], False)
    with graph.inserting_before(linear):
        made = graph.call_function(op, arguments)
        made.meta["val"] = _value(x, op, *arguments)
        quantized = _items(graph, made, 3)
    _replace_linear(graph, linear, given, quantized)
    return True


# --- the linear layer -------------------------------------------------------------------------------------------------
def _items(graph: fx.Graph, made: fx.Node, count: int) -> list[fx.Node]:
    nodes = []
    for index in range(count):
        node = graph.call_function(operator.getitem, (made, index))
        node.meta["val"] = made.meta["val"][index]
        nodes.append(node)
    return nodes


def _replace_linear(graph: fx.Graph, linear: fx.Node, given: dict[str, Any], quantized: list[fx.Node]) -> None:
    weight = (given["packed"], given["scales"], given["wsum"], given["bias"])
    plan = (given["n"], given["segments"], given["group_bits"], given["weight_group"])
    with graph.inserting_before(linear):
        node = graph.call_function(
            torch.ops.resq.linear_quantized.default, (*quantized, *weight, *plan, linear.meta["val"].dtype)
        )
    # The rest of its meta, such as the arguments' strides, is of another op.
    node.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(node)
    graph.erase_node(linear)
