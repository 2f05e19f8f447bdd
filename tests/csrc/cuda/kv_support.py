"""The decode attention kernels' source compiled for the host, and a batch run through it."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch

from tests.csrc.cuda.support import aligned, compiled
from tests.resq_vllm.gpu_kv.batches import Batch, Shape

STRIDES = ("query_token", "query_head", "output_token", "output_head", "cache_block", "cache_head", "table_row")
TENSORS = ("query", "cache", "output", "partial", "log_sums", "block_table", "seq_lens", "query_start")


class Arguments(ctypes.Structure):
    """struct KvDecodeArgs of kv_decode.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in TENSORS),
        *((name, ctypes.c_int64) for name in STRIDES),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("half", "window", "splits", "rows", "group", "kv_heads")),
    ]


@cache
def emulation() -> ctypes.CDLL:
    """The kernels on the host, compiled once a test run."""
    loaded = compiled("kv_emulation.cpp")
    assert loaded.resq_kv_args_bytes() == ctypes.sizeof(Arguments)
    return loaded


def merged(partial: torch.Tensor, log_sums: torch.Tensor, used: int) -> torch.Tensor:
    """[rows, head_dim] of partial [rows, splits, head_dim] and log_sums [rows, splits], of which ``used`` hold."""
    weights = torch.softmax(log_sums[:, :used].double() * torch.log(torch.tensor(2.0)), 1)
    return (weights[:, :, None] * partial[:, :used].double()).sum(1)


def extent(t: torch.Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    return t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))


def run(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int,
    rows: int,
    splits: int,
    partial: torch.Tensor | None,
    log_sums: torch.Tensor | None,
    seed: int,
) -> None:
    """One launch, as csrc/cuda/op_kv.cpp makes it; nothing but these tensors may be touched. scale: times log2 e."""
    held = (query, cache, output, partial, log_sums, block_table, seq_lens, query_start_loc)
    a = Arguments()
    for name, tensor in zip(TENSORS, held, strict=True):
        setattr(a, name, 0 if tensor is None else tensor.data_ptr())
    strides = (*query.stride()[:2], *output.stride()[:2], *cache.stride()[:2], block_table.stride(0))
    for name, stride in zip(STRIDES, strides, strict=True):
        setattr(a, name, stride)
    a.scale, a.half, a.window = scale, query.dtype == torch.float16, window
    a.splits, a.rows, a.group, a.kv_heads = splits, rows, query.shape[1] // cache.shape[1], cache.shape[1]
    sizes = (ctypes.c_int64 * len(held))(*(0 if t is None else extent(t) for t in held))
    assert emulation().resq_kv_decode(ctypes.byref(a), query.shape[2], len(seq_lens), sizes, seed) == 0


def decode(made: Batch, shape: Shape, splits: int, window: int, longest: int, mark: float, seed: int) -> torch.Tensor:
    """Attention of the batch [T, H, head_dim] by the emulated kernel; rows that no sequence covers are ``mark``."""
    dtype, dim, sequences = made.query.dtype, shape.head_dim, len(made.seq_lens)
    query = aligned((made.query.float() @ made.rotation).to(dtype))
    cache = aligned(made.cache)
    output = torch.full_like(query, mark)
    rows = longest * shape.group
    partial = torch.full((sequences, shape.kv_heads, rows, splits, dim), float("nan"))
    log_sums = torch.full((sequences, shape.kv_heads, rows, splits), float("nan"))
    batch = query, cache, output, made.block_table, made.seq_lens, made.query_start_loc
    run(*batch, dim**-0.5 * math.log2(math.e), window, rows, splits, partial, log_sums, seed)
    for s in range(sequences):
        first, end, length = *made.query_start_loc[s : s + 2].tolist(), int(made.seq_lens[s])
        used = used_splits(length, end - first, window, splits)
        if used < 2 or end == first:
            continue
        for h in range(shape.kv_heads):
            many = (end - first) * shape.group
            got = merged(partial[s, h, :many], log_sums[s, h, :many], used).to(dtype)
            output[first:end, h * shape.group : (h + 1) * shape.group] = got.unflatten(0, (-1, shape.group))
    return output


def used_splits(length: int, queries: int, window: int, splits: int) -> int:
    """Splits with pages of their own: as _tiles in resq_vllm/gpu_kv/decode.py."""
    begin = max(length - queries - window + 1, 0) // 64 if window > 0 else 0
    pages = -(-length // 64) - begin
    return -(-pages // max(-(-pages // splits), 1))
