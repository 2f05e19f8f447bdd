"""How a decode batch is cut over the GPU: splits of the context, tile widths, and the workspace they need.

Everything here follows from host integers (shapes, bounds, the number of processors), never from device data, so a
captured graph replays for any lengths: a program finds its own tokens from its sequence's length.
"""

from __future__ import annotations

from dataclasses import dataclass

# Decode programs, of one warp each, that are resident at a time on one processor by their registers (up to 248 a
# thread) and shared memory (24 KiB): one wave of them.
PROGRAMS_PER_SM = 8
MAX_SPLITS = 128
# One tile: while processors are free, more programs are quicker than longer ones (a tile is 2500 instructions).
TOKENS_PER_SPLIT = 64
# Rows of the decode kernel: the least tensor-core tile.
DECODE_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Query rows M at most and tokens N a program works on at a time, its warps, and the stages of its loads.

    A stage goes to the page's number, which the other loads wait for: 5 stages hold two tiles, 3 stages one.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


def decode_tile(head_dim: int) -> Tile:
    return Tile(DECODE_ROWS, 64, 1, 5)


def prefill_tile(head_dim: int) -> Tile:
    return Tile(128, 64, 8, 3) if head_dim <= 128 else Tile(64, 64, 4, 3)


def decode_splits(sequences: int, kv_heads: int, num_sms: int, max_seq_len: int) -> int:
    """Programs per sequence and kv head: one wave of the GPU in all, and no more than the longest context needs."""
    wave = PROGRAMS_PER_SM * num_sms // max(sequences * kv_heads, 1)
    return max(1, min(wave, MAX_SPLITS, -(-max_seq_len // TOKENS_PER_SPLIT)))


def split_bytes(sequences: int, splits: int, num_heads: int, head_dim: int, max_query_len: int) -> int:
    """Of the partial results: float32 [rows, splits, hd], and as many log-sums [rows, splits]; none without splits."""
    return 4 * (head_dim + 1) * sequences * num_heads * max_query_len * splits if splits > 1 else 0


def workspace_bytes(
    max_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int, max_query_len: int = 1
) -> int:
    """The largest workspace that :func:`resq_vllm.gpu_kv.attention` needs for such batches, in bytes (0: none).

    max_seqs: sequences of a decode batch at most; max_query_len: query tokens of each at most (more than 1 with
    speculative decoding); num_sms: the GPU's multiprocessors. Prefill and mixed batches need none.
    """
    if max_query_len * (num_heads // num_kv_heads) > DECODE_ROWS:
        return 0
    unbounded = MAX_SPLITS * TOKENS_PER_SPLIT
    return max(
        (
            split_bytes(
                sequences,
                decode_splits(sequences, num_kv_heads, num_sms, unbounded),
                num_heads,
                head_dim,
                max_query_len,
            )
            for sequences in range(1, min(max_seqs, PROGRAMS_PER_SM * num_sms) + 1)
        ),
        default=0,
    )
