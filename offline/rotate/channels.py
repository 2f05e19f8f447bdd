"""The order of down_proj's input channels: free to choose, since gate_proj's and up_proj's rows can be permuted.

The channels with the most energy form the high part. The others are dealt to the Hadamard blocks like cards, strongest
first and back and forth, so that no block gets two outliers while another gets none (the zigzag of DuQuant, arXiv
2406.01721, section 3.2). Small blocks then do what the paper's full-width Hadamard does, and are cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offline.models.adapter import LinearName, ModelAdapter
from offline.rotate.spec import DownLayout


def zigzag(ranked: torch.Tensor, blocks: int) -> torch.Tensor:
    """Deal ``ranked`` int64 [n] to ``blocks`` hands of n/blocks: 0 1 2 2 1 0 0 1 …; int64 [blocks, n/blocks]."""
    rounds = ranked.view(-1, blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def channel_order(energy: torch.Tensor, groups: int, high: int, block: int) -> torch.Tensor:
    """Permutation of f channels, int64 [f]: position -> channel.

    Args:
        energy: [f], what a channel contributes to the error if it is rounded coarsely.
        groups: equal groups, each [low | high] (one activation scale a part; a tensor-parallel rank takes whole ones).
        high: high channels of a group.
        block: width of a Hadamard block; divides ``high`` and f/groups − ``high``.

    """
    ranked = energy.argsort(descending=True, stable=True)
    strong, weak = ranked[: groups * high], ranked[groups * high :]
    parts = [zigzag(part, len(part) // block).reshape(-1, groups, block) for part in (weak, strong) if len(part)]
    # Block i of a part goes to group i mod groups.
    return torch.cat([part.transpose(0, 1).reshape(groups, -1) for part in parts], dim=1).flatten()


def permute_down(
    tensors: Mapping[str, torch.Tensor], adapter: ModelAdapter, layer: int, order: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One layer whose down_proj inputs stand in ``order`` int64 [f] (position -> channel): the same function.

    gate's and up's rows (and biases) and down's columns move; the other tensors are passed on.
    """
    result = dict(tensors)
    linears: tuple[LinearName, ...] = ("gate", "up")
    for linear in linears:
        for name in (f"{adapter.linear(layer, linear)}.weight", f"{adapter.linear(layer, linear)}.bias"):
            if name in result:
                result[name] = result[name][order.to(result[name].device)]
    down = adapter.linear(layer, "down") + ".weight"
    result[down] = result[down][:, order.to(result[down].device)]
    return result


def order_down(
    tensors: Mapping[str, torch.Tensor], adapter: ModelAdapter, layer: int, energy: torch.Tensor, layout: DownLayout
) -> dict[str, torch.Tensor]:
    """One layer with its down_proj inputs in the order of :func:`channel_order`; unchanged without a high part."""
    if not layout.high:
        return dict(tensors)
    return permute_down(tensors, adapter, layer, channel_order(energy, layout.groups, layout.high, layout.block))
