"""Index maths and arithmetic of csrc/cuda on the host: places of codes, nibbles, quotients, half-precision numbers."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops
from resq_vllm.formats.activations import ActivationLayout
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.hadamard import hadamard_matrix, hadamard_order
from resq_vllm.reference import block_hadamard
from tests.csrc.cuda.quantize_support import FLOAT_TYPES, aligned_copy, emulation, numbers, plans
from tests.csrc.support import assert_no_worse


def _compiled_plan(plan: LinearPlan, nibbles: bool) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    segments, bits = numbers(plan.flat_segments()), numbers(list(plan.group_bits))
    counts = numbers([0] * 4)
    arguments = (segments, len(segments), bits, len(bits), plan.weight_group, int(nibbles))
    assert emulation().resq_plan(*(_c(a) for a in arguments), None, None, counts) == 0
    runs, spans = torch.zeros(counts[0], 6, dtype=torch.int32), torch.zeros(counts[1], 4, dtype=torch.int32)
    places = (ctypes.c_void_p(runs.data_ptr()), ctypes.c_void_p(spans.data_ptr()))
    assert emulation().resq_plan(*(_c(a) for a in arguments), *places, counts) == 0
    return runs, spans, list(counts)


def _c(value: object) -> object:
    return ctypes.c_int64(value) if isinstance(value, int) else value


@settings(max_examples=200, deadline=None)
@given(plans(), st.booleans())
def test_runs_and_spans_are_those_of_the_layout(plan: LinearPlan, nibbles: bool) -> None:
    runs, spans, (_, _, row_bytes, low_pitch) = _compiled_plan(plan, nibbles)
    layout = ActivationLayout(plan, nibbles)
    expected = [
        [run.part, run.group, run.scale_row, place, run.length, -(-run.length // 32) * 32]
        for run, place in zip(plan.runs, layout.places, strict=True)
    ]
    assert runs.tolist() == expected
    assert (row_bytes, low_pitch) == (layout.row_bytes, layout.pitches[0])
    at = torch.cat([torch.arange(place, place + columns) for _, columns, _, place in spans.tolist()])
    assert spans[:, 0].tolist() == torch.cat((torch.zeros(1, dtype=torch.int32), spans[:, 1].cumsum(0)[:-1])).tolist()
    assert torch.equal(at, layout.columns)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=8, max_size=8))
def test_pack_nibbles(codes: list[int]) -> None:
    low, high = (sum(code << 8 * i for i, code in enumerate(four)) for four in (codes[:4], codes[4:]))
    word = emulation().resq_pack_nibbles(ctypes.c_uint32(low), ctypes.c_uint32(high))
    assert [word >> 4 * i & 15 for i in range(8)] == codes


@settings(max_examples=50, deadline=None)
@given(plans(), st.booleans(), st.integers(0, 2**31 - 1))
def test_code_at_reads_what_the_layout_packed(plan: LinearPlan, nibbles: bool, seed: int) -> None:
    layout = ActivationLayout(plan, nibbles)
    codes = torch.randint(0, 16, (1, plan.columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    row = layout.pack(codes)[0].contiguous()
    low = layout.pitches[0] * (2 if layout.packed_low else 1)
    for column, at in enumerate(layout.columns.tolist()):
        part = int(at >= low)
        start = ctypes.c_void_p(row.data_ptr() + (layout.pitches[0] if part else 0))
        u4 = ctypes.c_int64(layout.packed_low and not part)
        assert emulation().resq_code_at(start, ctypes.c_int64(at - low * part), u4) == codes[0, column]


@pytest.mark.parametrize("magnitude", [-126, -100, -96, -30, -3, 0, 5, 90, 96, 100, 120])
def test_quotients_are_those_of_a_division(magnitude: int) -> None:
    g = torch.Generator().manual_seed(magnitude + 200)
    n = 200_000
    d = (1 + torch.rand(n, generator=g)) * 2.0**magnitude
    # Half of them around the boundaries of rounding, where one unit in the last place would change a code.
    boundary = torch.randint(0, 256, (n // 2,), generator=g) + 0.5
    x = torch.cat((d[: n // 2] * boundary, d[n // 2 :] * torch.rand(n // 2, generator=g) * 256)).contiguous()
    x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, d))
    assert emulation().resq_wrong_quotients(*pointers, ctypes.c_int64(n)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_numbers(dtype: torch.dtype) -> None:
    which = ctypes.c_int64(dtype == torch.bfloat16)
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    widened = torch.empty(65536)
    emulation().resq_halves(which, ctypes.c_void_p(widened.data_ptr()))
    torch.testing.assert_close(widened, every.float(), rtol=0, atol=0, equal_nan=True)
    values = torch.cat((widened, torch.nextafter(widened, torch.tensor(float("inf"))), torch.randn(100_000) * 1e-6))
    values = values[~values.isnan()].contiguous()
    # Midpoints of neighbours, and their float neighbours: ties and what is just beside them.
    finite = widened[widened.isfinite()].sort().values
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    values = torch.cat((values, middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)))
    narrowed = torch.empty(len(values), dtype=dtype)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, narrowed))
    emulation().resq_to_halves(which, *pointers, ctypes.c_int64(len(values)))
    assert torch.equal(narrowed.view(torch.int16), values.to(dtype).view(torch.int16))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 256, 2048, 12, 24, 28 * 64, 20 * 8, 344 * 4, 148 * 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transform_alone(n: int, dtype: torch.dtype) -> None:
    k = hadamard_order(n)
    x = aligned_copy(torch.randn(2, 2 * n, generator=torch.Generator().manual_seed(n)).to(dtype))
    dense = aligned_copy(hadamard_matrix(k).float())
    out = torch.empty_like(x)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
    sizes = (ctypes.c_int64(v) for v in (2, 2 * n, 2))
    last = (ctypes.c_int64(v) for v in (k, FLOAT_TYPES[dtype], 96))
    assert emulation().resq_hadamard(*pointers, *sizes, ctypes.c_void_p(dense.data_ptr()), *last) == 0
    expected = block_hadamard(x.float(), 2)
    if k == 1:
        assert torch.equal(out, expected.to(dtype))
    elif dtype == torch.float32:
        assert_no_worse(out, expected, block_hadamard(x.double(), 2))
    else:
        torch.testing.assert_close(out.float(), ops.hadamard(x, 2, dense).float(), rtol=2**-7, atol=1e-6)
