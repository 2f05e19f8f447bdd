"""Contenders of the GPU linear benchmark: one weight as each wants it, in copies enough to keep the L2 cache cold.

A contender is measured on input that is ready for its kernel: bf16 for the 16-bit ones, quantized for those that
multiply integers or fp8, since engines fuse that step with the norm before it. "resq-linear" does both in two launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.stock_ops import op_reason
from resq_vllm import fused, ops
from resq_vllm.formats.plan import LinearPlan, Segment
from resq_vllm.formats.weights import pack_int4
from resq_vllm.hadamard import hadamard_matrix
from resq_vllm.quantized_linear import linear_quantized

GROUP = 128
HEAD_DIM = 128
Call = Callable[[], torch.Tensor]
# A site's kernel for one input: from x bf16 [M, K], the calls, each on a copy of the weight of its own.
Build = Callable[[torch.Tensor], Iterator[Call]]


class UnavailableError(Exception):
    """A contender cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A linear layer of a model: ``site`` decides how its columns are quantized."""

    name: str
    site: str
    outputs: int
    columns: int

    def plan(self) -> LinearPlan:
        """What `resq quantize` makes of the site with its default options, at one high column in eight."""
        k = self.columns
        if self.site == "down":
            return LinearPlan(tuple(Segment(k // 8, 0, g) for g in range(8)), (4,) * 8, hadamard_groups=8)
        if self.site == "head":
            return LinearPlan((Segment(k, 1, 0),), (8,))
        if self.site == "o":
            pair = (Segment(HEAD_DIM * 7 // 8, 0, 0), Segment(HEAD_DIM // 8, 1, 0))
            return LinearPlan(pair * (k // HEAD_DIM), (8,))
        return LinearPlan((Segment(k * 7 // 8, 0, 0), Segment(k // 8, 1, 1)), (4, 8))


LLAMA_8B = (
    Shape("8B qkv", "qkv", 6144, 4096),
    Shape("8B o", "o", 4096, 4096),
    Shape("8B gate_up", "gate_up", 28672, 4096),
    Shape("8B down", "down", 4096, 14336),
    Shape("8B lm_head", "head", 128256, 4096),
)
LLAMA_70B = (
    Shape("70B qkv", "qkv", 10240, 8192),
    Shape("70B o", "o", 8192, 8192),
    Shape("70B gate_up", "gate_up", 57344, 8192),
    Shape("70B down", "down", 8192, 28672),
)


@dataclass
class OurWeight:
    """Random codes of a shape, packed by the op, and the codes themselves for the check."""

    shape: Shape
    device: str = "cuda"
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator(self.device).manual_seed(self.seed)
        self.plan, n = self.shape.plan(), self.shape.outputs
        low, high = self.plan.part_columns
        at = {"device": self.device, "generator": g}
        self.low = torch.randint(-8, 8, (n, low), dtype=torch.int8, **at)  # type: ignore[call-overload]
        self.high = torch.randint(-128, 128, (n, high), dtype=torch.int8, **at)  # type: ignore[call-overload]
        self.scales = torch.rand(self.plan.scale_rows, n, **at) * 1e-3  # type: ignore[call-overload]
        self.segments, self.group_bits = self.plan.flat_segments(), list(self.plan.group_bits)
        self.packed, self.sums = ops.pack_weight(
            pack_int4(self.low) if low else None, self.high if high else None, 4, n, self.segments
        )

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of x as it is: the online Hadamard is not the GEMM's."""
        return fused.quantize_pack(x, self.segments, self.group_bits)


@dataclass(frozen=True)
class Contender:
    """arithmetic: "int8", "fp8" or "bf16", for the ceiling. weight_bytes: with scales, for (N, K)."""

    arithmetic: str
    weight_bytes: Callable[[Shape], int]
    build: Callable[[Shape], Build]


def clones(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    while True:
        yield tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in tensors)


# --- ours -------------------------------------------------------------------------------------------------------------
def our_bytes(shape: Shape) -> int:
    low, high = shape.plan().part_columns
    return shape.outputs * (low // 2 + high + 8 + 4 * len(shape.plan().runs))


def resq(shape: Shape) -> Build:
    weight = OurWeight(shape)

    def build(x: torch.Tensor) -> Iterator[Call]:
        quantized = weight.quantized(x)
        tail = (None, shape.outputs, weight.segments, weight.group_bits, x.dtype)
        for packed, scales, sums in clones((weight.packed, weight.scales, weight.sums)):
            yield lambda own=(packed, scales, sums): linear_quantized(quantized, *own, *tail)  # type: ignore[misc, call-arg]

    return build


def resq_linear(shape: Shape) -> Build:
    weight = OurWeight(shape)
    plan = weight.plan
    matrix = hadamard_matrix(plan.hadamard_k).float().cuda() if plan.hadamard_k > 1 else None

    def build(x: torch.Tensor) -> Iterator[Call]:
        tail = (None, shape.outputs, weight.segments, weight.group_bits, plan.hadamard_groups, matrix)
        for own in clones((weight.packed, weight.scales, weight.sums)):
            yield lambda own=own: ops.linear(x, *own, *tail)  # type: ignore[misc, call-arg]

    return build


# --- the others -------------------------------------------------------------------------------------------------------
def bf16(shape: Shape) -> Build:
    weight = torch.randn(shape.outputs, shape.columns, device="cuda", dtype=torch.bfloat16)

    def build(x: torch.Tensor) -> Iterator[Call]:
        for (own,) in clones((weight,)):
            yield lambda own=own: torch.nn.functional.linear(x, own)  # type: ignore[misc]

    return build


def require(*names: str) -> None:
    """Raises UnavailableError unless vLLM's CUDA library has these ops."""
    reason = op_reason(*names)
    if reason is not None:
        raise UnavailableError(reason)


def cutlass_w8a8(kind: torch.dtype) -> Callable[[Shape], Build]:
    def start(shape: Shape) -> Build:
        require("cutlass_scaled_mm")
        from vllm import _custom_ops as vllm_ops

        weight = torch.randint(-100, 100, (shape.outputs, shape.columns), device="cuda").to(kind)
        scale = torch.rand(1, shape.outputs, device="cuda")

        def build(x: torch.Tensor) -> Iterator[Call]:
            codes = (x * 20).clamp(-100, 100).to(kind)
            token_scale = torch.rand(len(x), 1, device="cuda")
            for own, own_scale in clones((weight, scale)):
                yield lambda w=own, s=own_scale: vllm_ops.cutlass_scaled_mm(  # type: ignore[misc]
                    codes, w.t(), token_scale, s, torch.bfloat16
                )

        return build

    return start


def random_nibbles(shape: Shape) -> torch.Tensor:
    """int32 [K/8, N]: eight random 4-bit weights a word."""
    return torch.randint(-(2**31), 2**31 - 1, (shape.columns // 8, shape.outputs), dtype=torch.int32, device="cuda")


def marlin(shape: Shape) -> Build:
    require("marlin_gemm", "gptq_marlin_repack")
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_make_workspace_new,
        marlin_permute_scales,
    )
    from vllm.scalar_type import scalar_types

    n, k = shape.outputs, shape.columns
    weight = vllm_ops.gptq_marlin_repack(random_nibbles(shape), k, n, 4)
    scale = marlin_permute_scales(torch.rand(k // GROUP, n, device="cuda", dtype=torch.bfloat16), k, n, GROUP)
    workspace = marlin_make_workspace_new(torch.device("cuda", torch.cuda.current_device()))

    def build(x: torch.Tensor) -> Iterator[Call]:
        for w, s in clones((weight, scale)):
            yield lambda w=w, s=s: vllm_ops.marlin_gemm(  # type: ignore[misc]
                x,
                None,
                w,
                None,
                s,
                None,
                None,
                None,
                workspace,
                scalar_types.uint4b8,
                len(x),
                n,
                k,
                use_fp32_reduce=True,
            )

    return build


def machete(shape: Shape) -> Build:
    require("machete_mm", "machete_prepack_B")
    from vllm import _custom_ops as vllm_ops
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    weight = vllm_ops.machete_prepack_B(
        random_nibbles(shape).t().contiguous().t(), torch.bfloat16, kind, torch.bfloat16
    )
    scale = torch.rand(shape.columns // GROUP, shape.outputs, device="cuda", dtype=torch.bfloat16)

    def build(x: torch.Tensor) -> Iterator[Call]:
        for w, s in clones((weight, scale)):
            yield lambda w=w, s=s: vllm_ops.machete_mm(  # type: ignore[misc]
                a=x, b_q=w, b_type=kind, b_group_scales=s, b_group_size=GROUP
            )

    return build


def cutlass_w4a8(shape: Shape) -> Build:
    require("cutlass_w4a8_mm", "cutlass_encode_and_reorder_int4b", "cutlass_pack_scale_fp8")
    from vllm import _custom_ops as vllm_ops

    weight = vllm_ops.cutlass_encode_and_reorder_int4b(random_nibbles(shape).t().contiguous().t())
    groups = torch.rand(shape.columns // GROUP, shape.outputs, device="cuda").to(torch.float8_e4m3fn)
    packed_scale = vllm_ops.cutlass_pack_scale_fp8(groups)
    channel_scale = torch.rand(shape.outputs, 1, device="cuda")

    def build(x: torch.Tensor) -> Iterator[Call]:
        codes, token_scale = x.to(torch.float8_e4m3fn), torch.rand(len(x), 1, device="cuda")
        for w, s, c in clones((weight, packed_scale, channel_scale)):
            yield lambda w=w, s=s, c=c: vllm_ops.cutlass_w4a8_mm(  # type: ignore[misc]
                a=codes, b_q=w, b_group_scales=s, b_group_size=GROUP, b_channel_scales=c, a_token_scales=token_scale
            )

    return build


def bytes_of(bits: int, scale_bytes: float) -> Callable[[Shape], int]:
    """Weight bytes at ``bits`` a weight and ``scale_bytes`` a group of GROUP columns (0: one float32 a channel)."""

    def count(shape: Shape) -> int:
        scales = int(shape.columns / GROUP * scale_bytes) if scale_bytes else 4 * (bits < 16)
        return shape.outputs * (shape.columns * bits // 8 + scales)

    return count


def contenders() -> dict[str, Contender]:
    """All of them by name; ours begin with "resq"."""
    return {
        "resq": Contender("int8", our_bytes, resq),
        "resq-linear": Contender("int8", our_bytes, resq_linear),
        "bf16": Contender("bf16", bytes_of(16, 0), bf16),
        "w8a8-int8": Contender("int8", bytes_of(8, 0), cutlass_w8a8(torch.int8)),
        "w8a8-fp8": Contender("fp8", bytes_of(8, 0), cutlass_w8a8(torch.float8_e4m3fn)),
        "marlin": Contender("bf16", bytes_of(4, 2), marlin),
        "machete": Contender("bf16", bytes_of(4, 2), machete),
        "cutlass-w4a8": Contender("fp8", bytes_of(4, 1), cutlass_w4a8),
    }
