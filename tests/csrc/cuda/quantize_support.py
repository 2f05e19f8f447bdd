"""The quantize kernels' source compiled for the host, and random plans for them."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from hypothesis import strategies as st

from resq_vllm.formats.plan import LinearPlan, Segment
from resq_vllm.hadamard import hadamard_matrix
from tests.csrc.cuda.support import compiled

FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Rows(ctypes.Structure):
    """struct Rows of quantize_emulation.cpp."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "x_stride", "dtype", "aligned", "threads", "seed")),
        ("weight", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("epsilon", ctypes.c_double),
        ("silu_mul", ctypes.c_int64),
        ("dense", ctypes.c_void_p),
        ("held", ctypes.c_int64),
        ("dense_order", ctypes.c_int64),
        ("hadamard_groups", ctypes.c_int64),
        ("segments", ctypes.c_void_p),
        ("n_segments", ctypes.c_int64),
        ("group_bits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_groups", "weight_group", "nibbles", "column_order")),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
    ]


@cache
def emulation() -> ctypes.CDLL:
    """The kernels on the host, compiled once a test run."""
    loaded = compiled("quantize_emulation.cpp")
    loaded.resq_message.restype = ctypes.c_char_p
    loaded.resq_wrong_quotients.restype = ctypes.c_int64
    loaded.resq_wrong_half_quotients.restype = ctypes.c_int64
    loaded.resq_quotient_of_half.restype = ctypes.c_float
    loaded.resq_pairs.restype = ctypes.c_uint32
    loaded.resq_held_vectors.restype = ctypes.c_int64
    loaded.resq_contiguous_threads.restype = ctypes.c_int64
    loaded.resq_pack_nibbles.restype = ctypes.c_uint32
    loaded.resq_code_at.restype = ctypes.c_uint32
    return loaded


def numbers(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def aligned_copy(x: torch.Tensor, multiple: int = 512) -> torch.Tensor:
    """A copy that begins at a multiple of ``multiple`` bytes, as on the device."""
    size = x.element_size()
    storage = torch.empty(x.numel() + multiple // size, dtype=x.dtype)
    skip = (-storage.data_ptr() % multiple) // size
    view = storage[skip : skip + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def dense_matrix(plan: LinearPlan) -> torch.Tensor | None:
    """H_k of the plan's Hadamard blocks, as the ops take it."""
    return aligned_copy(hadamard_matrix(plan.hadamard_k).float()) if plan.hadamard_k > 1 else None


def run_quantize(
    x: torch.Tensor,
    plan: LinearPlan,
    *,
    nibbles: bool = False,
    column_order: bool = False,
    threads: int = 64,
    seed: int = 1,
    weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    silu_mul: bool = False,
    held: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero of the kernel's own source. residual is replaced in place, as by the op.

    held: vectors a thread of the kernel of contiguous rows (RuntimeError if it does not take these), 0: the others.
    """
    input_rows = aligned_copy(x)
    segments, bits = numbers(plan.flat_segments()), numbers(list(plan.group_bits))
    dense = dense_matrix(plan)
    rows = Rows(x=input_rows.data_ptr(), rows=x.shape[0], dtype=FLOAT_TYPES[x.dtype])
    rows.threads, rows.seed, rows.epsilon, rows.silu_mul = threads, seed, epsilon, silu_mul
    rows.x_stride, rows.held = input_rows.stride(0), held
    rows.segments, rows.n_segments = ctypes.addressof(segments), len(segments)
    rows.group_bits, rows.n_groups = ctypes.addressof(bits), len(bits)
    rows.weight_group, rows.nibbles, rows.column_order = plan.weight_group, nibbles, column_order
    rows.hadamard_groups, rows.dense_order = plan.hadamard_groups, max(plan.hadamard_k, 1)
    rows.dense = None if dense is None else dense.data_ptr()
    rows.weight = None if weight is None else weight.data_ptr()
    rows.residual = None if residual is None else residual.data_ptr()
    _call(rows)
    # A block, too, must start at a multiple of 16 bytes.
    rows.aligned = plan.columns // rows.blocks * x.element_size() % 16 == 0 and (weight is None or _at_16(weight))
    rows.aligned = rows.aligned and (residual is None or _at_16(residual))
    codes = aligned_copy(torch.full((x.shape[0], rows.row_bytes), 0xA5, dtype=torch.uint8))
    scale = torch.full((x.shape[0], len(plan.group_bits)), float("nan"))
    zero = torch.full(scale.shape, -1, dtype=torch.int32)
    rows.codes, rows.scale, rows.zero = codes.data_ptr(), scale.data_ptr(), zero.data_ptr()
    _call(rows)
    return codes, scale, zero


def _at_16(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and (x.dim() == 1 or x.stride(0) * x.element_size() % 16 == 0)


def _call(rows: Rows) -> None:
    if emulation().resq_quantize(ctypes.byref(rows)):
        raise RuntimeError(emulation().resq_message().decode())


@st.composite
def plans(draw: st.DrawFn, hadamard: bool = False) -> LinearPlan:
    """Contiguous, head-wise and block plans, with widths that divide by nothing, and weight groups."""
    if hadamard:
        n = draw(st.sampled_from([1, 2, 4, 12, 12, 20, 28])) << draw(st.integers(0, 5))
        groups = draw(st.integers(1, 4))
        bits = draw(st.sampled_from([4, 8]))
        if draw(st.booleans()):
            segments = tuple(Segment(n, 0, g) for g in range(groups))
            return LinearPlan(segments, (bits,) * groups, hadamard_groups=groups)
        return LinearPlan((Segment(groups * n, 0, 0),), (bits,), hadamard_groups=groups)
    kind = draw(st.sampled_from(["contiguous", "heads", "blocks", "one part"]))
    low, high = draw(st.integers(1, 150)), draw(st.integers(1, 40))
    low_bits = draw(st.sampled_from([4, 8]))
    if kind == "one part":
        part = draw(st.sampled_from([0, 1]))
        return LinearPlan((Segment(low, part, 0),), (low_bits if part == 0 else 8,))
    if kind == "contiguous":
        return LinearPlan((Segment(low, 0, 0), Segment(high, 1, 1)), (low_bits, 8), weight_group=_divisor(draw, low))
    repeats = draw(st.integers(1, 5))
    if kind == "heads" and draw(st.booleans()):
        return LinearPlan((Segment(low, 0, 0), Segment(high, 1, 0)) * repeats, (8,))
    segments = tuple(s for r in range(repeats) for s in (Segment(low, 0, 2 * r), Segment(high, 1, 2 * r + 1)))
    return LinearPlan(segments, (low_bits, 8) * repeats, weight_group=_divisor(draw, low * repeats))


def _divisor(draw: st.DrawFn, columns: int) -> int:
    return draw(st.sampled_from([0, *(d for d in range(1, columns + 1) if columns % d == 0)]))
