"""How a decode batch is cut over the GPU: splits of the context, tile widths, and the workspace they need.

Everything here follows from host integers (shapes, bounds, the number of processors), never from device data, so a
captured graph replays for any lengths: a program finds its own tokens from its sequence's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# Decode programs, of one warp each, that are resident at a time on one processor of Hopper by their registers (up to
# 246 a thread: 8) and shared memory (29 KiB at head_dim 128 from Triton 3.6: 7; 13 KiB from 3.9). Not run on a GPU.
PROGRAMS_PER_SM = 7
# The same of the CUDA kernel, at head_dim 128: 20 KiB of shared memory and 1 KiB of the system's, up to 163 registers.
CUDA_PROGRAMS_PER_SM = 11
MAX_SPLITS = 128
# One tile: while processors are free, more programs are quicker than longer ones (a tile is 2500 instructions).
TOKENS_PER_SPLIT = 64
# Waves of programs at most: several short waves fill the GPU better than one and a rest, which takes as long again.
MAX_WAVES = 4
# What a program takes besides its tiles, in tiles: its start, the query, and its partial results.
PROGRAM_TILES = 0.5
# Rows of the decode kernel: the least tensor-core tile.
DECODE_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Query rows M at most and tokens N a program works on at a time, its warps, and the stages of its loads.

    A stage goes to the page's number, which the other loads wait for: 3 stages bring one tile while another is worked
    on.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


def decode_tile(head_dim: int) -> Tile:
    return Tile(DECODE_ROWS, 64, 1, 3)


def prefill_tile(head_dim: int) -> Tile:
    return Tile(128, 64, 8, 3) if head_dim <= 128 else Tile(64, 64, 4, 3)


def decode_splits(
    sequences: int, kv_heads: int, num_sms: int, max_seq_len: int, programs: int = PROGRAMS_PER_SM
) -> int:
    """Programs per sequence and kv head: those that end first, were all sequences as long as the longest.

    programs: resident on a processor.
    """
    return _splits(sequences * kv_heads, programs * num_sms, -(-max_seq_len // TOKENS_PER_SPLIT))


@cache
def _splits(rows: int, resident: int, tiles: int) -> int:
    """rows: pairs of sequence and kv head; resident: programs of a wave; tiles: of the longest context."""
    most = max(1, min(MAX_SPLITS, tiles, MAX_WAVES * resident // max(rows, 1)))
    return min(
        range(1, most + 1),
        key=lambda splits: -(-rows * splits // max(resident, 1)) * (-(-tiles // splits) + PROGRAM_TILES),
    )


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
    rows = max_query_len * (num_heads // num_kv_heads)
    programs = MAX_WAVES * max(PROGRAMS_PER_SM, CUDA_PROGRAMS_PER_SM) * num_sms
    if rows > DECODE_ROWS or programs < 2 * num_kv_heads:
        return 0
    # What is split has so many programs at most, and all sequences have MAX_SPLITS at most.
    programs = min(programs, max_seqs * num_kv_heads * MAX_SPLITS)
    return split_bytes(1, programs, rows, head_dim, 1)
