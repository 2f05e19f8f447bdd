"""The packed backend: pages, metadata, and an impl whose answers are the reference's for every way of batching."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import ops, reference
from resq_vllm.attention import ResQAttentionImpl, ResQMetadata, ResQMetadataBuilder, packed_backend
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.vllm_api import CommonAttentionMetadata, KVCacheLayout

LAYOUT = KVLayout(head_dim=64, high=8)
HEADS, KV_HEADS, BLOCK = 8, 2, 16
SCALE = LAYOUT.head_dim**-0.5


def rotation(seed: int = 7) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(LAYOUT.head_dim, LAYOUT.head_dim, generator=g))[0].contiguous()


def layer() -> Any:
    return SimpleNamespace(key_rotation=rotation(), layer_name="model.layers.0.self_attn.attn")


def impl(sliding_window: int | None = None) -> ResQAttentionImpl:
    found: ResQAttentionImpl = packed_backend(LAYOUT).get_impl_cls()(
        HEADS, LAYOUT.head_dim, SCALE, KV_HEADS, None, sliding_window
    )
    return found


def empty_cache(blocks: int = 12) -> torch.Tensor:
    return torch.zeros(blocks, KV_HEADS, BLOCK, LAYOUT.bytes_per_token, dtype=torch.uint8)


def qkv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, HEADS, LAYOUT.head_dim, generator=g),
        torch.randn(tokens, KV_HEADS, LAYOUT.head_dim, generator=g),
        torch.randn(tokens, KV_HEADS, LAYOUT.head_dim, generator=g),
    )


TABLE = torch.tensor([[5, 2, 9, 0], [1, 7, 3, 0]], dtype=torch.int32)


def slots(sequence: int, first: int, last: int) -> torch.Tensor:
    position = torch.arange(first, last)
    return TABLE[sequence].long()[position // BLOCK] * BLOCK + position % BLOCK


def batch(pieces: list[tuple[int, int, int]]) -> ResQMetadata:
    """A batch of (sequence, first token, end token) pieces."""
    lengths = [last - first for _, first, last in pieces]
    return ResQMetadata(
        tokens=sum(lengths),
        query_start_loc=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        seq_lens=torch.tensor([last for _, _, last in pieces], dtype=torch.int32),
        block_table=TABLE[[sequence for sequence, _, _ in pieces]],
        slot_mapping=torch.cat([slots(*piece) for piece in pieces]),
    )


def run(
    cache: torch.Tensor,
    pieces: list[tuple[int, int, int]],
    data: Sequence[tuple[torch.Tensor, ...]],
    window: int | None = None,
) -> list[torch.Tensor]:
    """Write and attend one batch; the outputs piece by piece."""
    it, lay, meta = impl(window), layer(), batch(pieces)
    q, k, v = (torch.cat([data[s][i][first:last] for s, first, last in pieces]) for i in range(3))
    out = torch.full_like(q, torch.nan)
    assert it.forward(lay, q, k, v, cache, meta, out) is out
    return list(out.split([last - first for _, first, last in pieces]))


def exact(data: tuple[torch.Tensor, ...], window: int | None = None) -> torch.Tensor:
    """The reference's attention over one whole sequence."""
    q, k, v = data
    cache = empty_cache()
    length = q.shape[0]
    reference.kv_write(k, v, cache, slots(0, 0, length), rotation(), LAYOUT)
    return reference.attention(
        q,
        cache,
        TABLE[:1],
        torch.tensor([length]),
        torch.tensor([0, length]),
        rotation(),
        SCALE,
        LAYOUT,
        -1 if window is None else window,
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # The kernels multiply q in 8 bits and P·V in bf16: 1 % of the output's size.
    error = (found - wanted).norm() / wanted.norm()
    assert error < 0.02, f"off by {error:.3f}"


@pytest.mark.parametrize("window", [None, 5])
def test_prefill_equals_the_reference(window: int | None) -> None:
    data = qkv(40)
    close(run(empty_cache(), [(0, 0, 40)], [data], window)[0], exact(data, window))


def test_chunked_prefill_and_decode_equal_one_prefill() -> None:
    data = [qkv(40)]
    whole = run(empty_cache(), [(0, 0, 40)], data)[0]
    cache = empty_cache()
    chunks = [run(cache, [(0, first, last)], data)[0] for first, last in ((0, 13), (13, 32), (32, 39), (39, 40))]
    close(torch.cat(chunks), whole)
    torch.testing.assert_close(chunks[-1], whole[-1:], rtol=1e-2, atol=1e-2)


def test_mixed_batch_equals_each_sequence_alone() -> None:
    data = [qkv(33, seed=1), qkv(20, seed=2)]
    cache = empty_cache()
    run(cache, [(0, 0, 32)], data)
    decode, prefill = run(cache, [(0, 32, 33), (1, 0, 20)], data)
    close(decode, exact(data[0])[32:])
    close(prefill, exact(data[1]))


def test_cached_prefix_gives_the_same_answer_as_computing_it() -> None:
    data = [qkv(40)]
    cache = empty_cache()
    whole = run(cache, [(0, 0, 40)], data)[0]
    again = run(cache, [(0, 32, 40)], data)[0]
    torch.testing.assert_close(again, whole[32:], rtol=1e-2, atol=1e-2)


def test_the_packed_pages_are_what_is_read() -> None:
    data = [qkv(40)]
    cache = empty_cache()
    whole = run(cache, [(0, 0, 40)], data)[0]
    cache.zero_()
    erased = run(cache, [(0, 39, 40)], data)[0]
    assert (erased - whole[39:]).norm() / whole[39:].norm() > 0.3


def test_skipped_slots_and_padding_leave_no_trace() -> None:
    data = [qkv(20)]
    it, lay = impl(), layer()
    q, k, v = data[0]
    clean, padded = empty_cache(), empty_cache()
    meta = batch([(0, 0, 19)])
    out = torch.full_like(q, 3.0)
    it.forward(lay, q[:19], k[:19], v[:19], clean, meta, out[:19])
    meta.slot_mapping = torch.cat([meta.slot_mapping, torch.tensor([-1])])
    again = torch.full_like(q, 3.0)
    it.forward(lay, q, k, v, padded, meta, again)
    assert torch.equal(clean, padded)
    assert torch.equal(again, out)
    assert bool((again[19] == 3.0).all())


def test_page_is_the_specification_s(monkeypatch: pytest.MonkeyPatch) -> None:
    _, k, v = qkv(20)
    cache, wanted = empty_cache(), empty_cache()
    q = torch.zeros(20, HEADS, LAYOUT.head_dim)
    impl().forward(layer(), q, k, v, cache, batch([(0, 0, 20)]), q)
    reference.kv_write(k, v, wanted, slots(0, 0, 20), rotation(), LAYOUT)
    for block in TABLE[0, :2].tolist():
        for head in range(KV_HEADS):
            for found, want in zip(
                reference.kv_read_page(cache[block, head], LAYOUT),
                reference.kv_read_page(wanted[block, head], LAYOUT),
                strict=True,
            ):
                # The rotation's float32 sums may round differently: one step of the 4-bit scale at most, and rarely.
                assert ((found - want).abs() > 1e-3).float().mean() < 0.02


def test_warm_up_has_no_metadata() -> None:
    q, k, v = qkv(4)
    out = torch.full_like(q, torch.nan)
    assert torch.equal(impl().forward(layer(), q, k, v, torch.empty(0), None, out), torch.zeros_like(q))


def test_every_cache_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    monkeypatch.setattr(ops, "prefer_huge_pages", lambda x: prepared.append(x.data_ptr()))
    it, lay, (_, k, v) = impl(), layer(), qkv(4)
    first, second = empty_cache(), empty_cache()
    out = torch.zeros(4, HEADS, LAYOUT.head_dim)
    it.forward(lay, out, k, v, torch.empty(0, dtype=torch.uint8), None, out)
    for cache in (first, first, second):
        it.forward(lay, out, k, v, cache, batch([(0, 0, 4)]), out)
    it.forward(lay, out, k, v, second, None, out)
    assert prepared == [first.data_ptr(), second.data_ptr()]


def test_fused_output_quantization_is_refused() -> None:
    q, k, v = qkv(4)
    with pytest.raises(ResQError, match="cannot quantize its output"):
        impl().forward(layer(), q, k, v, torch.empty(0), None, q, output_scale=torch.ones(1))


def test_backend_describes_the_page(process_group: None) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    backend = packed_backend(LAYOUT)
    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    packed = backend.customize_spec(spec)
    assert packed.dtype == torch.uint8
    assert packed.page_size_bytes == 128 * 2 * 84
    assert spec.page_size_bytes == 128 * 2 * 256
    assert backend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    assert backend.supports_block_size(16)
    assert not backend.supports_block_size(24)
    assert backend.supports_head_size(64)
    assert not backend.supports_head_size(128)
    assert backend.forward_includes_kv_cache_update
    assert backend.get_builder_cls() is ResQMetadataBuilder


def test_each_layout_has_its_own_backend_name() -> None:
    same, other = packed_backend(KVLayout(64, 8)), packed_backend(KVLayout(64, 8, 8))
    assert same is packed_backend(LAYOUT)
    assert same.full_cls_name() != other.full_cls_name()
    assert other.get_impl_cls().layout.low_bits == 8


def builder(monkeypatch: pytest.MonkeyPatch) -> ResQMetadataBuilder:
    import resq_vllm.attention as attention

    monkeypatch.setattr(attention, "require_all_packed", lambda config: None)
    monkeypatch.setattr(attention, "warm_up_layers", lambda *arguments: None)
    built: ResQMetadataBuilder = ResQMetadataBuilder(None, ["layer"], SimpleNamespace(), torch.device("cpu"))
    return built


def common(**changes: Any) -> CommonAttentionMetadata:
    meta = batch([(0, 0, 20)])
    fields: dict[str, Any] = {
        "query_start_loc": meta.query_start_loc,
        "query_start_loc_cpu": meta.query_start_loc,
        "seq_lens": meta.seq_lens,
        "num_reqs": 1,
        "num_actual_tokens": 20,
        "max_query_len": 20,
        "max_seq_len": 20,
        "block_table_tensor": meta.block_table,
        "slot_mapping": meta.slot_mapping,
    }
    return CommonAttentionMetadata(**{**fields, **changes})


def test_builder_passes_the_batch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = common()
    meta = builder(monkeypatch).build(0, given)
    assert meta.tokens == 20
    assert meta.seq_lens is given.seq_lens
    assert meta.block_table is given.block_table_tensor
    assert meta.slot_mapping is given.slot_mapping
    assert meta.query_start_loc is given.query_start_loc


@pytest.mark.parametrize("causal", [False, torch.tensor([True])])
def test_batch_that_is_not_causal_is_refused(monkeypatch: pytest.MonkeyPatch, causal: Any) -> None:
    with pytest.raises(ResQError, match="causal attention only"):
        builder(monkeypatch).build(0, common(causal=causal))


def test_attention_runs_on_compiled_kernels() -> None:
    assert ops.isa() in ("amx_int8", "avx512_vnni", "avx2_vnni", "avx2", "portable")
