"""Our layer of gpu_attention_contenders by Triton's interpreter or on a GPU (run by test_gpu_attention.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu_attention_contenders as contenders
from benchmarks.gpu_attention_contenders import Case, Heads, resq, slots
from resq_vllm import gpu_kv, reference
from resq_vllm.formats.kv_layout import KVLayout
from tests.resq_vllm.gpu_kv.batches import DEVICE

HEADS = Heads("small", 8, 2, 64)
LAYOUT = KVLayout(64, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "DEVICE", DEVICE)
    # Two tables.
    monkeypatch.setattr(contenders, "POOL_BYTES", 2 * 100 * HEADS.kv * LAYOUT.bytes_per_token)
    monkeypatch.setattr(contenders, "processors", lambda: 4)


@pytest.mark.parametrize("case", [Case("decode", 1, 100, 1), Case("prefill", 1, 100, 40)], ids=["decode", "prefill"])
def test_layer_is_the_write_and_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[torch.Tensor, ...]] = []
    attended: list[tuple[torch.Tensor, ...]] = []
    write, attention = gpu_kv.write_and_rotate, gpu_kv.attention

    def write_and_rotate(*arguments: Any) -> None:
        written.append(arguments)
        write(*arguments)

    def attend(*arguments: Any, **options: Any) -> None:
        attended.append((arguments[0].clone(), *arguments[1:]))
        attention(*arguments, **options)

    monkeypatch.setattr(gpu_kv, "write_and_rotate", write_and_rotate)
    monkeypatch.setattr(gpu_kv, "attention", attend)
    torch.manual_seed(0)
    calls = resq(case, HEADS, 4)
    assert len(calls.layer) == len(calls.attention) == 2
    calls.attention[1]()
    assert not written
    ((query, cache, _, table, lengths, starts, *_),) = attended
    unchanged = cache.clone()

    found = calls.layer[1]()
    assert isinstance(found, torch.Tensor)
    ((given, key, value, target, _, where, _, rotation, *_),) = written
    assert target is cache
    assert torch.equal(given, query)
    assert torch.equal(where, slots(case, table))
    assert not torch.equal(cache, unchanged)
    expected = unchanged.clone()
    # On a GPU a rotated key's sum has another order than the reference's; checks_write.py compares the kernel with it.
    if DEVICE == "cuda":
        gpu_kv.kv_write(key, value, expected, where, rotation, LAYOUT.high, LAYOUT.low_bits)
    else:
        reference.kv_write(key, value, expected, where, rotation, LAYOUT)
    assert torch.equal(cache, expected)
    scale = HEADS.dim**-0.5
    query, cache, table, lengths, starts, rotation = (x.cpu() for x in (given, cache, table, lengths, starts, rotation))
    exact, rounded = (
        reference.attention(query, cache, table, lengths, starts, rotation, scale, LAYOUT, -1, dtype)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert (found.cpu().double() - exact).abs().max() <= 2 * (rounded.double() - exact).abs().max()
