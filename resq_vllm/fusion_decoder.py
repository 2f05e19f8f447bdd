"""Graph pass for vLLM's CPU graphs: decoder layers and the attention between them become one op, ``resq::decoder``.

It runs after :mod:`resq_vllm.fusion_cpu`, on what that left: q, k and v from ``between_attentions``, their split, RoPE
(RotaryEmbedding.forward_static), vLLM's attention op, and its output into the next ``between_attentions``. Layers with
anything else between them, such as a norm of q and k, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph, Node

from resq_vllm import decoder
from resq_vllm.graph import calls, is_call, item, only_user, value_of

_aten, _resq = torch.ops.aten, torch.ops.resq
_LAYERS = (_resq.between_attentions.default, _resq.decoder_mlp.default)


@dataclass(frozen=True)
class Attention:
    """An attention op with all that leads to it from q, k and v of one linear layer."""

    call: Node
    qkv: Any
    positions: Any
    cos_sin_cache: Any
    query_heads: int
    kv_heads: int
    name: Any
    layer: Any  # the op that reads its output

    @property
    def shared(self) -> tuple[Any, ...]:
        """What layers of one stack have in common."""
        return self.positions, self.cos_sin_cache, self.query_heads, self.kv_heads


def fuse_stacks(graph: Graph) -> int:
    """Rewrite the graph in place; how many decoder layers it runs as part of a stack."""
    found = [attention for node in calls(graph, auto_functionalized) if (attention := _attention(node))]
    of_qkv = {attention.qkv: attention for attention in found}
    taken: set[Node] = set()
    for first in found:
        if first.call in taken:
            continue
        stack = _stack(first, of_qkv)
        taken.update(attention.call for attention in stack)
        _replace_stack(graph, stack)
    graph.eliminate_dead_code()
    return len(taken)


def _stack(first: Attention, of_qkv: dict[Any, Attention]) -> list[Attention]:
    """The attentions from ``first`` on that follow each other with one op in between."""
    stack = [first]
    while True:
        layer = stack[-1].layer
        results = {node.args[1]: node for node in layer.users}
        following = of_qkv.get(results.get(0))
        if layer.target is not _LAYERS[0] or following is None or following.shared != first.shared:
            return stack
        residual = results.get(1)
        if len(layer.users) != 2 or residual is None or only_user(residual) is not following.layer:
            return stack
        if following.layer.args[1] is not residual:
            return stack
        stack.append(following)


def _replace_stack(graph: Graph, stack: list[Attention]) -> None:
    weights: list[Any] = []
    epsilons: list[float] = []
    for attention in stack:
        for argument in attention.layer.args[2:]:
            (epsilons if isinstance(argument, float) else weights).append(argument)
    first, last = stack[0], stack[-1].layer
    with graph.inserting_before(last):
        ids = []
        for at in range(0, len(stack), decoder.NAMES_AT_ONCE):
            names = [attention.name for attention in stack[at : at + decoder.NAMES_AT_ONCE]]
            names += names[-1:] * (decoder.NAMES_AT_ONCE - len(names))
            ids.append(graph.call_function(_resq.layer_ids.default, tuple(names)))
            ids[-1].meta["val"] = value_of(first.positions).new_empty(decoder.NAMES_AT_ONCE)
        inputs = first.qkv, first.layer.args[1], first.positions, first.cos_sin_cache
        sizes = first.query_heads, first.kv_heads
        call = graph.call_function(_resq.decoder.default, (*inputs, ids, weights, epsilons, *sizes))
    call.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(call)
    # From the last layer on, each one's only reader gone: the attention op counts as one with side effects.
    for attention in reversed(stack):
        for node in list(attention.layer.users):
            graph.erase_node(node)
        graph.erase_node(attention.layer)
        _erase_chain(graph, attention)


def _erase_chain(graph: Graph, attention: Attention) -> None:
    """The attention op, what read its output, and what nothing else reads of what led to it."""
    (result,) = attention.call.users
    unread = list(result.users)
    while unread:
        node = unread.pop()
        if node.op == "call_function" and not node.users:
            unread += node.all_input_nodes
            graph.erase_node(node)


def _attention(node: Any) -> Attention | None:
    if not node.args or node.args[0] is not torch.ops.vllm.unified_attention_with_output.default:
        return None
    given = node.kwargs
    scales = ("output_scale", "output_block_scale", "kv_cache_dummy_dep")
    if any(given.get(name) is not None for name in scales) or not _fresh(given["output"]):
        return None
    query, key = (_turned(given[name]) for name in ("query", "key"))
    if query is None or key is None or query[1:] != key[1:]:
        return None
    value = given["value"]
    if not is_call(value, _aten.reshape.default) or value_of(value).ndim != 3:
        return None
    q, k, v = query[0], key[0], item(value.args[0], 2)
    split = item(q, 0)
    if split is None or item(k, 1) is not split or v is not split or not is_call(split, _aten.split_with_sizes.default):
        return None
    qkv, sizes, *dim = split.args
    head_dim = value_of(value).shape[-1]
    heads = [value_of(given[name]).shape[1] for name in ("query", "key", "value")]
    if heads[1] != heads[2] or list(sizes) != [count * head_dim for count in heads] or dim not in ([-1], [1]):
        return None
    positions, cache = query[1:]
    fits = value_of(cache).shape[-1] == head_dim and value_of(cache).dtype is value_of(qkv).dtype
    layer = _reader(node)
    flat = value_of(qkv).ndim == 2 and value_of(positions).ndim == 1
    if layer is None or not fits or not flat or only_user(qkv) is not split:
        return None
    return Attention(node, qkv, positions, cache, heads[0], heads[1], given["layer_name"], layer)


def _fresh(output: Any) -> bool:
    """Whether what the attention op writes to is a new tensor that nothing else sees."""
    if not is_call(output, _aten.reshape.default) or only_user(output) is None:
        return False
    empty = output.args[0]
    return is_call(empty, _aten.empty.memory_format) and only_user(empty) is output


def _reader(call: Node) -> Any:
    """The decoder layer that reads the attention's output, and nothing else does; None otherwise."""
    result = only_user(call)
    if result is None or item(result, 1) is not call:
        return None
    flat = only_user(result)
    if flat is None or not is_call(flat, _aten.reshape.default) or value_of(flat).ndim != 2:
        return None
    layer = only_user(flat)
    if layer is None or layer.target not in _LAYERS or layer.args[0] is not flat:
        return None
    return layer


def _turned(node: Any) -> Any:
    """RoPE's input [T, heads·hd], positions and cache for cat(x1·cos − x2·sin, x2·cos + x1·sin), as [T, heads, hd]."""
    if not is_call(node, _aten.cat.default) or node.args[1:] not in ((-1,), (2,)) or len(node.args[0]) != 2:
        return None
    first, second = node.args[0]
    if not is_call(first, _aten.sub.Tensor) or not is_call(second, _aten.add.Tensor):
        return None
    terms = [_product(term) for term in (*first.args, *second.args)]
    if None in terms:
        return None
    (x1, cos), (x2, sin), *others = terms
    if others != [(x2, cos), (x1, sin)]:
        return None
    halves = _half(x1, 0)
    if halves is None or halves is not _half(x2, 1) or not is_call(halves, _aten.reshape.default):
        return None
    cos_sin = _half(cos, 0)
    if cos_sin is None or cos_sin is not _half(sin, 1) or not is_call(cos_sin, _aten.index.Tensor):
        return None
    cache, indices = cos_sin.args
    if len(indices) != 1 or indices[0] is None or value_of(halves).ndim != 3:
        return None
    return halves.args[0], indices[0], cache


def _product(node: Any) -> Any:
    """Half of a head's values and what they are multiplied by, which is the same for all heads."""
    if not is_call(node, _aten.mul.Tensor):
        return None
    x, factor = node.args
    if not is_call(factor, _aten.unsqueeze.default) or factor.args[1] not in (-2, 1):
        return None
    return x, factor.args[0]


def _half(node: Any, which: int) -> Any:
    """What ``node`` is the first (0) or second (1) half of, along the last dim; None otherwise."""
    split = item(node, which)
    if split is None or not is_call(split, _aten.split.Tensor):
        return None
    source, size, *dim = split.args
    whole = value_of(source)
    return source if 2 * size == whole.shape[-1] and dim in ([-1], [whole.ndim - 1]) else None
