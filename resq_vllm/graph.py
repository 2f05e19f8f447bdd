"""Looking at torch.fx graphs and rewriting them: what the CPU's passes share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node


def calls(graph: Graph, target: object) -> list[Node]:
    """The nodes that call ``target``, in order."""
    return [node for node in graph.nodes if node.target is target]


# torch.fx types an argument of a node as everything that it may be: Any here.
def is_call(node: Any, target: object) -> bool:
    return isinstance(node, Node) and node.target is target


def value_of(node: Any) -> torch.Tensor:
    """The fake tensor that stands for a node's result."""
    value: torch.Tensor = node.meta["val"]
    return value


def item(node: Any, index: int | None = None) -> Any:
    """The node whose result ``index`` (or any) ``node`` is, or None."""
    if not is_call(node, operator.getitem) or index not in (None, node.args[1]):
        return None
    return node.args[0]


def only_user(node: Node) -> Any:
    """The node that reads ``node``, where that is one; None otherwise."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def replace(graph: Graph, call: Node, index: int, nodes: list[Any]) -> None:
    """Let result ``index`` of ``call`` stand for ``nodes``."""
    if nodes:
        result = graph.call_function(operator.getitem, (call, index))
        result.meta["val"] = call.meta["val"][index]
        for node in nodes:
            node.replace_all_uses_with(result)
