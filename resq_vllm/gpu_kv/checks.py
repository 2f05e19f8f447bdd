"""What the launchers refuse, each in one sentence, before anything runs. Shapes and types only: no device is read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from resq_vllm.errors import ResQError
from resq_vllm.gpu_kv.page import Page
from resq_vllm.gpu_kv.schedule import prefill_tile

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _require(holds: bool, sentence: Callable[[], str]) -> None:
    # Sentences are made for an error alone: every layer of a step outside of graphs comes by here twice.
    if not holds:
        raise ResQError(sentence())


def check_pages(cache: torch.Tensor, page: Page, kv_heads: int) -> None:
    _require(
        cache.dtype == torch.uint8 and cache.dim() == 4 and cache.shape[1] == kv_heads,
        lambda: f"the KV cache must be uint8 [blocks, {kv_heads}, N, C], not {cache.dtype} {list(cache.shape)}",
    )
    content = (page.zeros + 2 * page.parts * page.tokens) // page.tokens
    _require(
        cache.shape[3] == content and cache.stride(3) == 1 and cache.stride(2) == content,
        lambda: (
            f"a page of the KV cache must be {page.tokens} contiguous rows of {content} bytes, not of {cache.shape[3]} "
            f"with strides {cache.stride()[2:]}"
        ),
    )
    _require(
        cache.stride(0) % 16 == 0 and cache.stride(1) % 16 == 0 and cache.data_ptr() % 16 == 0,
        lambda: f"pages of the KV cache must begin at multiples of 16 bytes; its strides are {cache.stride()[:2]}",
    )


def check_rotation(rotation: torch.Tensor | None, head_dim: int) -> None:
    _require(
        rotation is None
        or (rotation.dtype == torch.float32 and rotation.shape == (head_dim, head_dim) and rotation.is_contiguous()),
        lambda: f"the key rotation must be a contiguous float32 [{head_dim}, {head_dim}]",
    )


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor | None,
    page: Page,
) -> None:
    """Raise ResQError on arguments that kv_write does not take."""
    _require(
        key.dtype in _FLOATS and key.shape == value.shape and value.dtype == key.dtype,
        lambda: (
            f"key and value must be alike and bf16, float16 or float32, not {key.dtype} {list(key.shape)} and "
            f"{value.dtype} {list(value.shape)}"
        ),
    )
    _require(key.stride(2) == 1 and value.stride(2) == 1, lambda: "the last dim of key and value must be contiguous")
    _require(
        slot_mapping.dtype == torch.int64 and slot_mapping.dim() == 1 and slot_mapping.shape[0] <= key.shape[0],
        lambda: (
            f"slot_mapping must be int64 with at most {key.shape[0]} entries, not {slot_mapping.dtype} "
            f"{list(slot_mapping.shape)}"
        ),
    )
    _require(slot_mapping.is_contiguous(), lambda: "slot_mapping must be contiguous")
    check_rotation(rotation, page.head_dim)
    check_pages(cache, page, key.shape[1])


def check_query(query: torch.Tensor, output: torch.Tensor, key: torch.Tensor, query_start_loc: torch.Tensor) -> None:
    """Raise ResQError on queries that write_and_rotate does not take beside ``key``."""
    _require(
        query.dtype == key.dtype and query.shape[2:] == key.shape[2:],
        lambda: (
            f"query must be {key.dtype} with {key.shape[2]} dims a head like the keys, not {query.dtype} "
            f"{list(query.shape)}"
        ),
    )
    _check_alike(query, output)
    _check_int32("query_start_loc", query_start_loc, (query_start_loc.shape[0],))


def _check_alike(query: torch.Tensor, output: torch.Tensor) -> None:
    _require(
        query.dtype in _FLOATS and query.shape == output.shape and output.dtype == query.dtype,
        lambda: (
            f"query and output must be alike and bf16, float16 or float32, not {query.dtype} {list(query.shape)} and "
            f"{output.dtype} {list(output.shape)}"
        ),
    )
    _require(
        query.stride(2) == 1 and output.stride(2) == 1, lambda: "the last dim of query and output must be contiguous"
    )


def _check_int32(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    _require(
        tensor.dtype == torch.int32 and tensor.shape == shape and tensor.stride(-1) == 1,
        lambda: (
            f"{name} must be int32 {list(shape)} with a contiguous last dim, not {tensor.dtype} {list(tensor.shape)}"
        ),
    )


def check_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    page: Page,
) -> None:
    """Raise ResQError on arguments that attention does not take."""
    _check_alike(query, output)
    _require(
        query.shape[1] % cache.shape[1] == 0,
        lambda: f"{query.shape[1]} query heads are no multiple of the KV cache's {cache.shape[1]} heads",
    )
    rows = prefill_tile(page.head_dim).rows
    _require(
        query.shape[1] <= rows * cache.shape[1],
        lambda: f"{query.shape[1] // cache.shape[1]} query heads for each KV head are more than the kernels' {rows}",
    )
    sequences = seq_lens.shape[0]
    _check_int32("seq_lens", seq_lens, (sequences,))
    _check_int32("query_start_loc", query_start_loc, (sequences + 1,))
    _check_int32("block_table", block_table, (sequences, block_table.shape[-1]))
    check_rotation(rotation, page.head_dim)
    check_pages(cache, page, cache.shape[1])
