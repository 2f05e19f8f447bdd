"""The compiled ops: loads ``resq_vllm/_C.abi3.so``, tells torch.compile their shapes, and wraps them with types.

Importing this module registers ``torch.ops.resq.*``. The specification of every op is its namesake in
``resq_vllm.reference``; the formats are ``resq_vllm.formats``. Symbols: M tokens, K input columns, N outputs, G
activation groups, R runs, T tokens, hd head_dim. All tensors live on one device; which ops have CUDA kernels is in
``csrc/cuda/README.md`` (``resq_vllm.cuda`` loads them).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq_vllm import cuda
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import LinearPlan, Run, Segment

try:
    from resq_vllm import _C  # type: ignore[attr-defined]  # noqa: F401  (loading the library registers the ops)
except ImportError as error:
    raise ResQError(
        f"the compiled kernels resq_vllm/_C.abi3.so cannot be loaded ({error}); build them with "
        "`pip install --no-build-isolation -e .` in this environment"
    ) from error

cuda.load()

# Of the kernels' weight layout (csrc/cpu/kernels.h, csrc/cpu/plan.cpp): needed to size the output of pack_weight.
_SUPERBLOCK_COLUMNS = 64
_RUN_MULTIPLE = 8


# --- kernels' instruction set -----------------------------------------------------------------------------------------
def isa() -> str:
    """Which kernels run: "amx_int8", "avx512_vnni", "avx2_vnni", "avx2" or "portable".

    The environment variable RESQ_ISA forces one.
    Raises ResQError when RESQ_ISA names an unknown set, or one that this machine lacks.
    """
    try:
        return torch.ops.resq.isa()
    except RuntimeError as error:
        raise ResQError(_first_line(error)) from error


def set_isa(name: str) -> str:
    """Switch the whole process to kernels ``name`` ("" = the best this machine has); returns what runs now.

    "avx512_vnni:in_order" and "avx512_vnni:side_by_side" choose how few tokens read weights as well, which otherwise
    follows the processor's make: AMD's read one stretch fastest, Intel's four at once.
    For tests and measurements; not while an op runs. Raises ResQError as :func:`isa` does.
    """
    try:
        return torch.ops.resq.set_isa(name)
    except RuntimeError as error:
        raise ResQError(_first_line(error)) from error


def attention_kernels(dtype: torch.dtype, head_dim: int, high: int, low_bits: int) -> str:
    """Which kernels attend over such a cache in a model of ``dtype``: "decode int8 AMX, prefill bfloat16 AMX".

    A float32 kernel on a machine that has faster ones comes with its reason. Raises RuntimeError with one sentence on
    bad arguments.
    """
    return torch.ops.resq.attention_kernels(str(dtype).removeprefix("torch."), head_dim, high, low_bits)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# --- ops --------------------------------------------------------------------------------------------------------------
def pack_weight(
    low: torch.Tensor | None,
    high: torch.Tensor | None,
    low_bits: int,
    n: int,
    segments: Sequence[int],
    weight_group: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-lay checkpoint weights for :func:`linear`.

    low: uint8 [N, K_l/2] (4 bit, see formats.weights) or int8 [N, K_l] (8 bit); high: int8 [N, K_h]; None for a part
    without columns. segments, weight_group: LinearPlan.flat_segments() and its weight_group. Returns the packed weight,
    uint8 of a private layout, and int32 [R, N] column sums of every run. Raises RuntimeError with one sentence when
    shapes disagree.
    """
    return torch.ops.resq.pack_weight(low, high, low_bits, n, segments, weight_group)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int = 0,
    hadamard_k: torch.Tensor | None = None,
    weight_group: int = 0,
) -> torch.Tensor:
    """y [..., N] = x [..., K]·Wᵀ + bias with x quantized per token on the way in (online Hadamard included).

    packed, wsum: from :func:`pack_weight` with the same weight_group; scales float32 [LinearPlan.scale_rows, N]: the
    low part's row or rows (one a weight group), then the high part's; a row of an absent part is ignored. bias [N];
    hadamard_k float32 [k, k] when the block order's k > 1. The result has x's dtype and equals reference.linear bit for
    bit where the Hadamard has k = 1. Raises RuntimeError with one sentence on bad arguments.
    """
    return torch.ops.resq.linear(
        x, packed, scales, wsum, bias, n, segments, group_bits, hadamard_groups, hadamard_k, weight_group
    )


def plan_tensor(
    segments: Sequence[int], group_bits: Sequence[int], hadamard_groups: int = 0, weight_group: int = 0
) -> torch.Tensor:
    """A plan as :func:`linear_planned` takes it: int64, made once a layer."""
    return torch.tensor(
        [hadamard_groups, weight_group, len(segments), *segments, *group_bits], dtype=torch.int64, device="cpu"
    )


def linear_planned(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    bias: torch.Tensor | None,
    plan: torch.Tensor,
    hadamard_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`linear` with its lists and numbers in ``plan`` (from :func:`plan_tensor`, on the CPU): cheaper to call."""
    return torch.ops.resq.linear_planned.default(x, packed, scales, wsum, bias, plan, hadamard_k)


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K]·Wᵀ + bias for few rows of x: weight [N, K] contiguous and bias [N], all bfloat16, sums in float32.

    Reads the weight once for every 8 rows, at the memory's speed up to about 4. A row's result does not depend on the
    other rows. Raises RuntimeError with one sentence on bad arguments.
    """
    return torch.ops.resq.linear_bf16.default(x, weight, bias)


def quantize_activation(
    x: torch.Tensor,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int = 0,
    hadamard_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] -> codes uint8 [M, K] in x's column order, scale float32 [M, G], zero point int32 [M, G]."""
    return torch.ops.resq.quantize_activation(x, segments, group_bits, hadamard_groups, hadamard_k)


def hadamard(x: torch.Tensor, groups: int, hadamard_k: torch.Tensor | None = None) -> torch.Tensor:
    """Block-diagonal Hadamard of x [..., groups·n], in float32 and cast to x's dtype; hadamard_k as in linear."""
    return torch.ops.resq.hadamard(x, groups, hadamard_k)


def prefer_huge_pages(x: torch.Tensor) -> None:
    """Ask the operating system for 2 MiB pages under contiguous ``x``, whose values stay.

    A hint: without support nothing happens. Decode attention reads the cache a quarter faster with them.
    """
    torch.ops.resq.prefer_huge_pages(x)


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor | None,
    high: int,
    low_bits: int,
) -> None:
    """Rotate key by U_C, quantize key and value [T, Hkv, hd] and pack them into kv_cache, in place.

    kv_cache uint8 [blocks, Hkv, N, C] with contiguous pages; slot_mapping int64 [<= T] = block·N + offset, negative =
    skip; rotation float32 [hd, hd]. Raises RuntimeError with one sentence on bad arguments, before anything is written.
    """
    torch.ops.resq.kv_write.default(key, value, kv_cache, slot_mapping, rotation, high, low_bits)


def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    high: int,
    low_bits: int,
    sliding_window: int = -1,
) -> None:
    """Causal attention of query [T, H, hd] over its sequences' packed pages, into out [T, H, hd].

    block_table int32 [S, blocks], seq_lens int32 [S] (new tokens included), query_start_loc int32 [S+1];
    sliding_window: tokens a query sees, itself included, −1 = all. Rows that no sequence covers are left alone.
    Raises RuntimeError with one sentence on bad arguments.
    """
    torch.ops.resq.attention.default(
        query,
        kv_cache,
        out,
        block_table,
        seq_lens,
        query_start_loc,
        rotation,
        scale,
        high,
        low_bits,
        sliding_window,
    )


def kv_write_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    high: int,
    low_bits: int,
    sliding_window: int = -1,
) -> None:
    """:func:`kv_write`, then :func:`attention`: a call less a layer, which in a decode step counts."""
    torch.ops.resq.kv_write_attention.default(
        query,
        key,
        value,
        kv_cache,
        out,
        slot_mapping,
        block_table,
        seq_lens,
        query_start_loc,
        rotation,
        scale,
        high,
        low_bits,
        sliding_window,
    )


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, heads: int) -> None:
    """Rotary embedding, in place, of the first ``heads`` heads of every row of x [T, ...]; ``reference.rope`` is its
    specification.

    positions int64 [T]; cos_sin_cache [positions, hd] of x's dtype. Raises RuntimeError with one sentence on bad input.
    """
    torch.ops.resq.rope.default(x, positions, cos_sin_cache, heads)


# --- shapes for torch.compile -----------------------------------------------------------------------------------------
@torch.library.register_fake("resq::linear")
def _linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int,
    hadamard_k: torch.Tensor | None,
    weight_group: int = 0,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("resq::linear_planned")
def _linear_planned_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    bias: torch.Tensor | None,
    plan: torch.Tensor,
    hadamard_k: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _cuda_packed_bytes(runs: Sequence[Run], bits: tuple[int, int], n: int) -> int:
    """csrc/cuda/weights.h: a table of runs of 32 bytes, then 512 bytes per 16 channels and 64 (4 bit) or 32 columns."""
    blocks = sum(-(-run.length // (256 // bits[run.part])) for run in runs)
    return -(-32 * len(runs) // 512) * 512 + -(-n // 16) * blocks * 512


@torch.library.register_fake("resq::pack_weight")
def _pack_weight_fake(
    low: torch.Tensor | None,
    high: torch.Tensor | None,
    low_bits: int,
    n: int,
    segments: Sequence[int],
    weight_group: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    like = low if low is not None else high
    assert like is not None
    bits = (low_bits, 8)
    triples = zip(segments[0::3], segments[1::3], segments[2::3], strict=True)
    runs = LinearPlan(tuple(Segment(*triple) for triple in triples), (), weight_group=weight_group).runs
    if like.device.type == "cuda":
        packed = like.new_empty((_cuda_packed_bytes(runs, bits, n),), dtype=torch.uint8)
        return packed, like.new_empty((len(runs), n), dtype=torch.int32)
    superblock = sum(
        _SUPERBLOCK_COLUMNS * (-(-run.length // _RUN_MULTIPLE) * _RUN_MULTIPLE) * bits[run.part] // 8 for run in runs
    )
    packed = like.new_empty((-(-n // _SUPERBLOCK_COLUMNS) * superblock,), dtype=torch.uint8)
    return packed, like.new_empty((len(runs), n), dtype=torch.int32)


@torch.library.register_fake("resq::quantize_activation")
def _quantize_activation_fake(
    x: torch.Tensor,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int,
    hadamard_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = (x.shape[0], len(group_bits))
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(groups, dtype=torch.int32),
    )


@torch.library.register_fake("resq::linear_bf16")
def _linear_bf16_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("resq::hadamard")
def _hadamard_fake(x: torch.Tensor, groups: int, hadamard_k: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("resq::kv_write")
def _kv_write_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor | None,
    high: int,
    low_bits: int,
) -> None:
    return None


@torch.library.register_fake("resq::attention")
def _attention_fake(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    high: int,
    low_bits: int,
    sliding_window: int,
) -> None:
    return None


@torch.library.register_fake("resq::kv_write_attention")
def _kv_write_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    high: int,
    low_bits: int,
    sliding_window: int,
) -> None:
    return None
