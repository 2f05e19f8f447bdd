"""Contenders of the attention benchmark: one step of a layer over paged caches, as each writes and attends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.stock_ops import CPUAttention
from resq_vllm import ops
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import high_count

KV_HEADS = 8
# vLLM's default on CPUs.
BLOCK_TOKENS = 128
# A prompt's tokens beyond this come in further steps: chunked prefill.
STEP_TOKENS = 2048
HIGH_FRACTION = 1 / 8
BASELINE = "bf16"
NAMES = ("resq", BASELINE, "fp8")
# Relative error (root mean square) against exact attention over the same keys and values.
LARGEST_ERROR = 0.4


@dataclass(frozen=True)
class Case:
    """One step of a layer with KV_HEADS kv heads. `context`: tokens of every sequence, the new ones included."""

    phase: str
    context: int
    batch: int
    head_dim: int
    gqa: int

    @property
    def new_tokens(self) -> int:
        """New tokens of every sequence: one when decoding, else the last of the chunks in which a prompt is read."""
        return 1 if self.phase == "decode" else max(1, min(self.context, STEP_TOKENS // self.batch))

    @property
    def heads(self) -> int:
        return KV_HEADS * self.gqa

    @property
    def blocks(self) -> int:
        """Pages that the batch needs."""
        return self.batch * -(-self.context // BLOCK_TOKENS)

    @property
    def cached_tokens(self) -> int:
        return self.batch * self.context


class Batch:
    """A case's tensors: query [T, H, hd], key and value [T, KV_HEADS, hd] of the new tokens, lengths as in vLLM."""

    def __init__(self, case: Case) -> None:
        tokens = case.batch * case.new_tokens
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, case.head_dim, generator=generator).bfloat16()

        self.case = case
        self.query, self.key, self.value = normal(case.heads), normal(KV_HEADS), normal(KV_HEADS)
        self.scale = case.head_dim**-0.5
        self.seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32)
        self.query_start_loc = torch.arange(0, tokens + 1, case.new_tokens, dtype=torch.int32)

    def slots(self, block_table: torch.Tensor) -> torch.Tensor:
        """Places (block·BLOCK_TOKENS + offset) of the new tokens in the pages of block_table, int64 [T]."""
        case = self.case
        positions = torch.arange(case.context - case.new_tokens, case.context)
        blocks = block_table[:, positions // BLOCK_TOKENS].long()
        return (blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS).flatten()


class Contender(ABC):
    """A cache format with the op that writes it and the op that attends over it, for one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token and kv head."""

    @abstractmethod
    def empty_cache(self, blocks: int) -> torch.Tensor:
        """A cache of so many pages, the first dimension."""

    @abstractmethod
    def write(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Put key and value [T, KV_HEADS, hd] into the pages."""

    @abstractmethod
    def attend(self, cache: torch.Tensor, block_table: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of the batch's query over the pages, into out [T, H, hd]."""

    def step(self, cache: torch.Tensor, block_table: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
        """What a layer does: write the new tokens, then attend."""
        self.write(self.batch.key, self.batch.value, cache, slots)
        self.attend(cache, block_table, out)


class ResQ(Contender):
    """The packed 4/8-bit cache of `resq quantize` with its default options, keys rotated by an orthogonal matrix."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        size = batch.case.head_dim
        self._layout = KVLayout(size, high_count(size, HIGH_FRACTION))
        normal = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
        self._rotation = torch.linalg.qr(normal).Q.contiguous()
        self._of_layer = (self._rotation, batch.scale, self._layout.high, self._layout.low_bits)

    @property
    def bytes_per_token(self) -> int:
        return self._layout.bytes_per_token

    def empty_cache(self, blocks: int) -> torch.Tensor:
        cache = torch.zeros(blocks, KV_HEADS, BLOCK_TOKENS, self.bytes_per_token, dtype=torch.uint8)
        ops.prefer_huge_pages(cache)  # as the attention backend does
        return cache

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        ops.kv_write(key, value, cache, slots, self._rotation, self._layout.high, self._layout.low_bits)

    def attend(self, cache: torch.Tensor, block_table: torch.Tensor, out: torch.Tensor) -> None:
        batch = self.batch
        ops.attention(batch.query, cache, out, block_table, batch.seq_lens, batch.query_start_loc, *self._of_layer)

    def step(self, cache: torch.Tensor, block_table: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
        # The backend calls one op, vLLM's own two.
        batch = self.batch
        ops.kv_write_attention(
            batch.query,
            batch.key,
            batch.value,
            cache,
            out,
            slots,
            block_table,
            batch.seq_lens,
            batch.query_start_loc,
            *self._of_layer,
        )


class Stock(Contender):
    """vLLM's CPU attention. Its schedule, made once a step for all layers, is not part of what is timed."""

    def __init__(self, batch: Batch, kv_cache_dtype: str) -> None:
        super().__init__(batch)
        case = batch.case
        self._attention = CPUAttention(kv_cache_dtype, case.heads, KV_HEADS, case.head_dim, BLOCK_TOKENS)
        self._schedule = self._attention.schedule(batch.seq_lens, batch.query_start_loc)
        self._element_bytes = 2 if kv_cache_dtype == "auto" else 1

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.batch.case.head_dim * self._element_bytes

    def empty_cache(self, blocks: int) -> torch.Tensor:
        return self._attention.cache(blocks)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        self._attention.write(key, value, cache, slots)

    def attend(self, cache: torch.Tensor, block_table: torch.Tensor, out: torch.Tensor) -> None:
        batch = self.batch
        lengths = (batch.seq_lens, batch.query_start_loc)
        self._attention.attend(batch.query, cache, out, block_table, *lengths, self._schedule, batch.scale)


def contender(name: str, batch: Batch) -> Contender:
    """One of NAMES."""
    return ResQ(batch) if name == "resq" else Stock(batch, "auto" if name == BASELINE else name)


def block_tables(case: Case, copies: int) -> list[torch.Tensor]:
    """For every copy, block table int32 [batch, pages] of pages of its own, scattered as in a server that has run."""
    order = torch.randperm(copies * case.blocks, generator=torch.Generator().manual_seed(2)).int()
    return [part.view(case.batch, -1) for part in order.split(case.blocks)]


def fill(chosen: Contender, cache: torch.Tensor) -> None:
    """Fill every page: one with random tokens, the others with its bytes (the values do not change the speed)."""
    generator = torch.Generator().manual_seed(3)
    shape = (BLOCK_TOKENS, KV_HEADS, chosen.batch.case.head_dim)
    key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    chosen.write(key, value, cache, torch.arange(BLOCK_TOKENS))
    cache[1:] = cache[:1]


def calls(chosen: Contender, tables: list[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """The contender's step, once for every block table, over one filled cache."""
    batch = chosen.batch
    cache = chosen.empty_cache(len(tables) * batch.case.blocks)
    fill(chosen, cache)
    out = torch.empty_like(batch.query)
    for table in tables:
        slots = batch.slots(table)
        yield lambda table=table, slots=slots: chosen.step(cache, table, slots, out)  # type: ignore[misc]


def relative_error(name: str, case: Case) -> float:
    """Error (root mean square, relative) of a contender's step on a prompt, against exact attention."""
    batch = Batch(case)
    chosen = contender(name, batch)
    cache, out = chosen.empty_cache(case.blocks), torch.empty_like(batch.query)
    table = block_tables(case, 1)[0]
    chosen.step(cache, table, batch.slots(table), out)
    query, key, value = (
        tensor.float().view(case.batch, case.new_tokens, -1, case.head_dim).transpose(1, 2)
        for tensor in (batch.query, batch.key, batch.value)
    )
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = exact.transpose(1, 2).reshape(out.shape)
    return float((out.float() - expected).norm() / expected.norm())
