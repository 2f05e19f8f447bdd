"""The low-rank correction of a linear layer when serving: y += (x·A)·B with the unquantized x (arXiv 2402.02446).

The checkpoint has A [K, k] and B [k, N] per Hugging Face module, in the model dtype. A fused layer (q, k, v; gate, up)
joins its modules' A side by side, [K, S·k], and their B block by block, [S·k, N], so that two matmuls serve them all.
Column-parallel layers split B, row-parallel ones split A (the all-reduce then sums the ranks' corrections).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from resq_vllm.vllm_api import ChannelQuantScaleParameter, LinearBase, set_weight_attrs

FIRST, SECOND = "low_rank_a", "low_rank_b"
_QKV = {"q": 0, "k": 1, "v": 2}
Loader = Callable[..., None]


def register(
    layer: LinearBase,
    loads: Callable[[str, Loader], Loader],
    vllm_loader: Loader,
    rank: int,
    columns: int,
    ranks: int,
    outputs: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Register the checkpoint's parameters on ``layer``.

    Args:
        layer: of this tensor-parallel rank.
        loads: wraps a loader of the parameter it names (:class:`resq_vllm.linear._Loads`).
        vllm_loader: vLLM's own, which knows what rows of N belong to this rank.
        rank: k.
        columns: K on this rank.
        ranks: how many ranks share the input's columns.
        outputs: N on this rank of every fused module.
        dtype: of the parameters.

    """
    first = torch.nn.Parameter(torch.empty(columns, rank * len(outputs), dtype=dtype), requires_grad=False)

    def load_first(param: torch.nn.Parameter, loaded: torch.Tensor, *shard: Any) -> None:
        at = _slot(shard) * rank
        assert loaded.shape == (columns * ranks, rank)
        # Of several shares of K (a row-parallel layer), this rank's.
        start = layer.tp_rank * columns if ranks > 1 else 0
        param.data[:, at : at + rank].copy_(loaded[start : start + columns])

    def load_second(param: torch.nn.Parameter, loaded: torch.Tensor, *shard: Any) -> None:
        # vLLM splits outputs as it does for scales, so B is kept as [N, k] until every module has come.
        vllm_loader(param, loaded.T.contiguous(), *shard)

    set_weight_attrs(first, {"weight_loader": loads(FIRST, load_first)})
    layer.register_parameter(FIRST, first)
    second = ChannelQuantScaleParameter(
        data=torch.empty(sum(outputs), rank, dtype=dtype), output_dim=0, weight_loader=loads(SECOND, load_second)
    )
    layer.register_parameter(SECOND, second)


def join(second: torch.Tensor, outputs: Sequence[int]) -> torch.Tensor:
    """B of the fused layer, block-diagonal [S·k, N], from the modules' [N, k] one below the other."""
    return torch.block_diag(*(part.T for part in second.split(list(outputs))))


def _slot(shard: tuple[Any, ...]) -> int:
    if not shard:
        return 0
    return _QKV[shard[0]] if isinstance(shard[0], str) else int(shard[0])
