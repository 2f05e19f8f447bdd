"""attention in a CUDA graph, on a GPU (run by test_kernels.py): a replay follows lengths and pages that changed."""

from __future__ import annotations

import torch

from resq_vllm.gpu_kv import attention, workspace_bytes
from tests.resq_vllm.gpu_kv.batches import DEVICE, Sequence, Shape, batch, errors

SHAPE = Shape(128, 16, 4, 4, 2, 64)
LONGEST, SMS = 4096, 132


def test_a_replay_attends_over_the_lengths_of_the_day() -> None:
    first = batch(SHAPE, [Sequence(40, 1), Sequence(3000, 1)], torch.bfloat16)
    second = batch(SHAPE, [Sequence(2900, 1), Sequence(0, 0)], torch.bfloat16, seed=1)
    blocks = max(first.cache.shape[0], second.cache.shape[0])
    columns = LONGEST // SHAPE.block
    cache = torch.zeros(blocks, *first.cache.shape[1:], dtype=torch.uint8, device=DEVICE)
    table = torch.zeros(2, columns, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    starts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    query = torch.zeros(5, SHAPE.heads, SHAPE.head_dim, dtype=torch.bfloat16, device=DEVICE)
    turn = torch.zeros(SHAPE.head_dim, SHAPE.head_dim, device=DEVICE)
    size = workspace_bytes(2, SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, SMS)
    workspace, output = torch.empty(size, dtype=torch.uint8, device=DEVICE), torch.zeros_like(query)

    def run() -> None:
        scale, high, bits = SHAPE.head_dim**-0.5, SHAPE.high, SHAPE.low_bits
        arguments = (query, cache, output, table, lengths, starts, turn, scale, high, bits)
        attention(*arguments, -1, 1, LONGEST, workspace, num_sms=SMS)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for made in (first, second):
        cache[: made.cache.shape[0]] = made.cache.to(DEVICE)
        table.zero_()
        table[:, : made.block_table.shape[1]] = made.block_table.to(DEVICE)
        lengths.copy_(made.seq_lens)
        starts.copy_(made.query_start_loc)
        query[: made.query.shape[0]] = made.query.to(DEVICE)
        turn.copy_(made.rotation)
        graph.replay()
        found, allowed = errors(made, SHAPE, output[: made.query.shape[0]].cpu(), -1)
        assert found <= 2 * allowed
