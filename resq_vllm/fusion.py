"""Graph pass for vLLM's CPU graphs: RMSNorm, residual sum and SiLU·mul move into the linear layer that reads them.

Between a decoder's kernels inductor would call a kernel of its own for each of them, and Python for every call: a tenth of
a decode step, and with long prompts a fifth of the time, most of it SiLU. A decoder layer becomes ``norm_linear`` (qkv),
attention and ``decoder_mlp`` (o, gate_up, down); where something stands in between, such as an all-reduce or a low-rank
correction, the parts that still match are fused one by one. Shapes of the graph: vllm/ir/ops/layernorm.py and
SiluAndMul.forward_native.
"""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from resq_vllm import fused_linear  # noqa: F401  (registers the fused ops' shapes)
from resq_vllm.log import log_once

if TYPE_CHECKING:
    from resq_vllm.vllm_api import VllmConfig

_aten, _prims, _resq = torch.ops.aten, torch.ops.prims, torch.ops.resq
_KEY = "post_grad_custom_pre_pass"


def enable(config: VllmConfig) -> None:
    """Have vLLM's compilation of this model run the pass; a pass that was configured already stays in its place."""
    options = config.compilation_config.inductor_compile_config
    if isinstance(options.setdefault(_KEY, FuseDecoder()), FuseDecoder):
        return
    log_once(logging.WARNING, f"ResQ: norms and activations are not fused, because {_KEY} is set in inductor's options")


class FuseDecoder(CustomGraphPass):
    """Rewrites a functional graph in place."""

    def __call__(self, graph: Graph) -> None:
        linears = [node for node in graph.nodes if node.target is _resq.linear_planned.default]
        fused = sum(_fuse_norm(graph, node) or _fuse_silu(graph, node) for node in linears)
        graph.eliminate_dead_code()
        downs = [node for node in graph.nodes if node.target is _resq.silu_linear.default]
        mlps = sum(_fuse_mlp(graph, node) for node in downs)
        log_once(
            logging.INFO,
            f"ResQ: {fused} of {len(linears)} linear layers took in the norm or activation before them, {mlps} decoder "
            "layers run as one op after their attention",
        )

    def uuid(self) -> str:
        """What the compilation caches of inductor and vLLM know this pass by (vLLM's hash takes no bytes)."""
        return get_hash_for_files((__file__,)).hex()


def _is(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.target is target


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _cast_from(node: object, dtype: torch.dtype) -> Node | None:
    """The node of ``dtype`` that ``node`` is a conversion of to float32."""
    if not _is(node, _prims.convert_element_type.default):
        return None
    source, to = node.args  # type: ignore[union-attr]
    return source if to is torch.float32 and isinstance(source, Node) and _dtype(source) is dtype else None


def _either(node: Node, target: object) -> tuple[Node, Node] | None:
    """Of a product's two factors first the one with ``target``."""
    for first, second in (node.args[:2], node.args[1::-1]):
        if _is(first, target) and isinstance(second, Node):
            return first, second  # type: ignore[return-value]
    return None


def _fuse_norm(graph: Graph, linear: Node) -> bool:
    """linear(norm(x)·w) and linear(norm(x + residual)·w) -> norm_linear."""
    x, *layer = linear.args
    if not _is(x, _aten.mul.Tensor) or len(x.users) != 1:  # type: ignore[union-attr]
        return False
    factors = _either(x, _prims.convert_element_type.default)  # type: ignore[arg-type]
    if factors is None:
        return False
    normed, weight = factors
    dtype = _dtype(x)  # type: ignore[arg-type]
    scaled = normed.args[0]
    if not _is(scaled, _aten.mul.Tensor) or weight.meta["val"].ndim != 1 or _dtype(weight) is not dtype:
        return False
    parts = _either(scaled, _aten.rsqrt.default)  # type: ignore[arg-type]
    if parts is None:
        return False
    root, total = parts
    shifted = root.args[0]
    if not _is(shifted, _aten.add.Tensor):
        return False
    mean, epsilon = shifted.args  # type: ignore[union-attr]
    if not _is(mean, _aten.mean.dim) or list(mean.args[1:]) != [[-1], True] or not isinstance(epsilon, float):  # type: ignore[union-attr]
        return False
    square = mean.args[0]  # type: ignore[union-attr]
    if not _is(square, _aten.pow.Tensor_Scalar) or square.args != (total, 2):  # type: ignore[union-attr]
        return False
    residual: Node | None = None
    sums: list[Node] = []
    source = _cast_from(total, dtype)
    if source is None:
        if not _is(total, _aten.add.Tensor):
            return False
        terms = [_cast_from(term, dtype) for term in total.args]
        if len(terms) != 2 or terms[0] is None or terms[1] is None:
            return False
        source, residual = terms[0], terms[1]
        sums = [user for user in total.users if _is(user, _prims.convert_element_type.default)]
        order = {node: place for place, node in enumerate(graph.nodes)}
        late = all(order[user] > order[linear] for node in sums for user in node.users)
        if set(total.users) != {square, scaled, *sums} or any(n.args[1] is not dtype for n in sums) or not late:
            return False
        if source.meta["val"].shape != residual.meta["val"].shape:
            return False
    with graph.inserting_before(linear):
        call = graph.call_function(_resq.norm_linear.default, (source, residual, weight, epsilon, *layer))
        y = graph.call_function(operator.getitem, (call, 0))
        y.meta["val"] = linear.meta["val"]
        total_out = source.meta["val"] if residual is not None else source.meta["val"].new_empty((0,))
        call.meta["val"] = (linear.meta["val"], total_out)
        linear.replace_all_uses_with(y)
        if residual is not None:
            out = graph.call_function(operator.getitem, (call, 1))
            out.meta["val"] = total_out
            for node in sums:
                node.replace_all_uses_with(out)
    graph.erase_node(linear)
    return True


def _fuse_silu(graph: Graph, linear: Node) -> bool:
    """linear(silu(gate)·up) with [gate | up] one tensor -> silu_linear."""
    x, *layer = linear.args
    if not _is(x, _aten.mul.Tensor) or len(x.users) != 1:  # type: ignore[union-attr]
        return False
    factors = _either(x, _prims.convert_element_type.default)  # type: ignore[arg-type]
    if factors is None:
        return False
    dtype = _dtype(x)  # type: ignore[arg-type]
    quotient, up = factors[0].args[0], factors[1]
    if not _is(quotient, _aten.div.Tensor):
        return False
    row, denominator = quotient.args  # type: ignore[union-attr]
    gate = _cast_from(row, dtype)
    if gate is None or not _is(denominator, _aten.add.Tensor) or denominator.args[1] != 1:  # type: ignore[union-attr]
        return False
    exp = denominator.args[0]  # type: ignore[union-attr]
    if not _is(exp, _aten.exp.default) or not _is(exp.args[0], _aten.neg.default) or exp.args[0].args[0] is not row:  # type: ignore[union-attr]
        return False
    joined = gate.args[0]
    if not _is(gate, _aten.slice.Tensor) or not _is(up, _aten.slice.Tensor) or up.args[0] is not joined:
        return False
    width = joined.meta["val"].shape[-1]  # type: ignore[union-attr]
    last = joined.meta["val"].ndim - 1  # type: ignore[union-attr]
    halves = [_slice(node) for node in (gate, up)]
    if halves != [(last, 0, width // 2), (last, width // 2, width)]:
        return False
    with graph.inserting_before(linear):
        call = graph.call_function(_resq.silu_linear.default, (joined, *layer))
        call.meta["val"] = linear.meta["val"]
        linear.replace_all_uses_with(call)
    graph.erase_node(linear)
    return True


def _slice(node: Node) -> tuple[int, int, int]:
    source, dim, start, end = (*node.args, None, None)[:4]
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    return dim % len(shape), start or 0, shape[dim] if end is None else min(end, shape[dim])  # type: ignore


def _fuse_mlp(graph: Graph, down: Node) -> bool:
    """silu_linear(norm_linear(linear(x), residual)) -> decoder_mlp."""
    up, *down_layer = down.args
    if not _is(up, operator.getitem) or len(up.users) != 1:  # type: ignore[union-attr]
        return False
    norm, place = up.args  # type: ignore[union-attr]
    if not _is(norm, _resq.norm_linear.default) or place != 0:
        return False
    o, residual, weight, epsilon, *up_layer = norm.args  # type: ignore[union-attr]
    if residual is None or not _is(o, _resq.linear_planned.default) or len(o.users) != 1:
        return False
    x, *o_layer = o.args
    order = {node: place for place, node in enumerate(graph.nodes)}
    sums = [node for node in norm.users if node is not up]  # type: ignore[union-attr]
    if any(order[user] < order[down] for node in sums for user in node.users):
        return False
    with graph.inserting_before(down):
        call = graph.call_function(
            _resq.decoder_mlp.default, (x, residual, *o_layer, weight, epsilon, *up_layer, *down_layer)
        )
        call.meta["val"] = (down.meta["val"], residual.meta["val"])
        for node, index, value in ((down, 0, down.meta["val"]), *((node, 1, residual.meta["val"]) for node in sums)):
            out = graph.call_function(operator.getitem, (call, index))
            out.meta["val"] = value
            node.replace_all_uses_with(out)
    for node in (down, *sums, up, norm, o):
        graph.erase_node(node)
    return True
