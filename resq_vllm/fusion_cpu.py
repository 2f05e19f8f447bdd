"""Graph pass for vLLM's CPU graphs: RMSNorm, residual sum and SiLU·mul move into the linear layer that reads them.

Otherwise inductor makes kernels of their own of them, and Python calls each: a tenth of a decode step and, with 2048
prompt tokens in a batch, a fifth of the time. From one attention to the next all is one op, ``between_attentions`` (o,
gate_up, down, the next layer's qkv), and :mod:`resq_vllm.fusion_decoder` joins those with the attentions between them.
Where something else stands in between, such as an all-reduce or a low-rank correction, the parts that still match are
fused one by one. The graphs are those of vllm/ir/ops/layernorm.py and SiluAndMul.forward_native.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from resq_vllm import fused_linear, fusion_decoder  # noqa: F401  (registers the fused ops' shapes)
from resq_vllm.fusion import SWITCH, switched_off
from resq_vllm.graph import calls, is_call, replace, value_of
from resq_vllm.log import log_once
from resq_vllm.vllm_api import CompilationMode

if TYPE_CHECKING:
    from resq_vllm.vllm_api import VllmConfig

OPTION = "post_grad_custom_pre_pass"
_aten, _resq = torch.ops.aten, torch.ops.resq
_cast = torch.ops.prims.convert_element_type.default


def install(config: VllmConfig) -> None:
    """Have the compilation of this model run the pass; one that was configured before stays in its place."""
    if switched_off():
        log_once(logging.INFO, f"ResQ: norms and activations are not fused, as {SWITCH}=0 says")
        return
    if config.compilation_config.mode == CompilationMode.NONE:
        log_once(logging.INFO, "ResQ: norms and activations are not fused, since torch.compile is off")
        return
    options = config.compilation_config.inductor_compile_config
    if not isinstance(options.setdefault(OPTION, FuseDecoder()), FuseDecoder):
        log_once(logging.WARNING, f"ResQ: norms and activations are not fused, since inductor's {OPTION} is in use")


class FuseDecoder(CustomGraphPass):
    """Rewrites a functional graph in place."""

    def __call__(self, graph: Graph) -> None:
        linears = calls(graph, _resq.linear_planned.default)
        fused = sum(_fuse_norm(graph, node) or _fuse_silu(graph, node) for node in linears)
        graph.eliminate_dead_code()
        mlps = sum(_fuse_mlp(graph, node) for node in calls(graph, _resq.silu_linear.default))
        for node in calls(graph, _resq.norm_linear.default):
            _fuse_next(graph, node)
        stacked = fusion_decoder.fuse_stacks(graph)
        log_once(
            logging.INFO,
            f"ResQ: {fused} of {len(linears)} linear layers took in the norm or activation before them, {mlps} decoder "
            f"layers run as one op after their attention, {stacked} of them and their attention in one op for all",
        )

    def uuid(self) -> str:
        """What the compilation caches of inductor and vLLM know this pass by (vLLM's hash takes no bytes)."""
        return get_hash_for_files((__file__, fusion_decoder.__file__, inspect.getfile(calls))).hex()


# Nodes and their arguments are Any below: torch.fx types an argument as everything that it may be.
def _cast_to_float(node: Any, dtype: torch.dtype) -> Any:
    """The node of ``dtype`` that ``node`` converts to float32, or None."""
    if not is_call(node, _cast) or node.args[1] is not torch.float32:
        return None
    source = node.args[0]
    return source if value_of(source).dtype is dtype else None


def _factors(node: Any, target: object) -> tuple[Any, Any]:
    """The factors of a product, that with ``target`` first; None twice where ``node`` is no such product."""
    if is_call(node, _aten.mul.Tensor):
        for first, second in (node.args, node.args[::-1]):
            if is_call(first, target) and isinstance(second, Node):
                return first, second
    return None, None


def _after(graph: Graph, last: Node, nodes: Iterable[Node]) -> bool:
    """Whether everything that reads one of ``nodes`` comes after ``last``."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    return all(order[user] > order[last] for node in nodes for user in node.users)


def _fuse_norm(graph: Graph, linear: Any) -> bool:
    """linear(norm(x)·weight) and linear(norm(x + residual)·weight) -> norm_linear."""
    x, *layer = linear.args
    normed, weight = _factors(x, _cast)
    if normed is None or len(x.users) != 1:
        return False
    dtype = value_of(x).dtype
    root, total = _factors(normed.args[0], _aten.rsqrt.default)
    if root is None or value_of(weight).ndim != 1 or value_of(weight).dtype is not dtype:
        return False
    if not is_call(root.args[0], _aten.add.Tensor):
        return False
    mean, epsilon = root.args[0].args
    if not is_call(mean, _aten.mean.dim) or list(mean.args[1:]) != [[-1], True] or not isinstance(epsilon, float):
        return False
    square = mean.args[0]
    if not is_call(square, _aten.pow.Tensor_Scalar) or square.args != (total, 2):
        return False
    source, residual, sums = _cast_to_float(total, dtype), None, []
    if source is None:
        if not is_call(total, _aten.add.Tensor):
            return False
        source, residual = (_cast_to_float(term, dtype) for term in total.args)
        if source is None or residual is None or value_of(source).shape != value_of(residual).shape:
            return False
        sums = [user for user in total.users if is_call(user, _cast) and user.args[1] is dtype]
        if set(total.users) != {square, normed.args[0], *sums} or not _after(graph, linear, sums):
            return False
    with graph.inserting_before(linear):
        call = graph.call_function(_resq.norm_linear.default, (source, residual, weight, epsilon, *layer))
        total_out = value_of(source) if residual is not None else value_of(source).new_empty((0,))
        call.meta["val"] = value_of(linear), total_out
        replace(graph, call, 0, [linear])
        replace(graph, call, 1, sums)
    graph.erase_node(linear)
    return True


def _fuse_silu(graph: Graph, linear: Any) -> bool:
    """linear(silu(gate)·up) with [gate | up] one tensor -> silu_linear."""
    x, *layer = linear.args
    activated, up = _factors(x, _cast)
    if activated is None or len(x.users) != 1 or not is_call(activated.args[0], _aten.div.Tensor):
        return False
    row, denominator = activated.args[0].args
    gate = _cast_to_float(row, value_of(x).dtype)
    if gate is None or not is_call(denominator, _aten.add.Tensor) or denominator.args[1] != 1:
        return False
    exp = denominator.args[0]
    negative: Any = exp.args[0] if is_call(exp, _aten.exp.default) else None
    if not is_call(negative, _aten.neg.default) or negative.args[0] is not row:
        return False
    if not is_call(gate, _aten.slice.Tensor) or not is_call(up, _aten.slice.Tensor) or gate.args[0] is not up.args[0]:
        return False
    joined = gate.args[0]
    last, width = value_of(joined).ndim - 1, value_of(joined).shape[-1]
    if [_slice(gate), _slice(up)] != [(last, 0, width // 2, 1), (last, width // 2, width, 1)]:
        return False
    with graph.inserting_before(linear):
        call = graph.call_function(_resq.silu_linear.default, (joined, *layer))
    call.meta["val"] = value_of(linear)
    linear.replace_all_uses_with(call)
    graph.erase_node(linear)
    return True


def _slice(node: Any) -> tuple[int, int, int, int]:
    """Dimension, start, end and step."""
    given, defaults = list(node.args), [None, 0, None, None, 1]
    source, dim, start, end, step = given + defaults[len(given) :]
    shape = value_of(source).shape
    return dim % len(shape), start or 0, shape[dim] if end is None else min(end, shape[dim]), step


def _fuse_mlp(graph: Graph, down: Any) -> bool:
    """silu_linear(norm_linear(linear(x), residual)) -> decoder_mlp."""
    gate_up, *down_layer = down.args
    if not is_call(gate_up, operator.getitem) or len(gate_up.users) != 1 or gate_up.args[1] != 0:
        return False
    norm = gate_up.args[0]
    if not is_call(norm, _resq.norm_linear.default):
        return False
    o, residual, weight, epsilon, *up_layer = norm.args
    sums = [node for node in norm.users if node is not gate_up]
    if residual is None or not is_call(o, _resq.linear_planned.default) or len(o.users) != 1:
        return False
    if not _after(graph, down, sums):
        return False
    x, *o_layer = o.args
    with graph.inserting_before(down):
        layers = (*o_layer, weight, epsilon, *up_layer, *down_layer)
        call = graph.call_function(_resq.decoder_mlp.default, (x, residual, *layers))
        call.meta["val"] = value_of(down), value_of(residual)
        replace(graph, call, 0, [down])
        replace(graph, call, 1, sums)
    for node in (down, *sums, gate_up, norm, o):
        graph.erase_node(node)
    return True


def _fuse_next(graph: Graph, norm: Any) -> bool:
    """norm_linear(decoder_mlp(...)) -> between_attentions."""
    x, residual, *layer = norm.args
    if not is_call(x, operator.getitem) or not is_call(residual, operator.getitem) or x.args[0] is not residual.args[0]:
        return False
    mlp = x.args[0]
    alone = all(len(node.users) == 1 for node in (x, residual)) and set(mlp.users) == {x, residual}
    if not is_call(mlp, _resq.decoder_mlp.default) or (x.args[1], residual.args[1]) != (0, 1) or not alone:
        return False
    with graph.inserting_before(norm):
        call = graph.call_function(_resq.between_attentions.default, (*mlp.args, *layer))
    call.meta["val"] = norm.meta["val"]
    norm.replace_all_uses_with(call)
    for node in (norm, x, residual, mlp):
        graph.erase_node(node)
    return True
