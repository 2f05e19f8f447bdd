"""Contenders of the linear benchmark: one weight, quantized and laid out as each wants it, in many copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks import stock_ops
from benchmarks.ceilings import Arithmetic
from offline.models.registry import adapter_for
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.sites import build_sites
from resq_vllm import ops
from resq_vllm.formats.metadata import SiteName
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.formats.weights import pack_int4
from resq_vllm.hadamard import hadamard_matrix

Linear = stock_ops.Linear
HEAD_DIM = 64
BF16_BASELINES = ("bf16", "bf16-vllm")
# Relative error (root mean square) that 4-bit weights and activations may have; a wrong layout gives about 1.4.
LARGEST_ERROR = 0.4


class UnavailableError(Exception):
    """A contender cannot be measured on this machine or for this shape; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A way to compute x·Wᵀ.

    Attributes:
        arithmetic: what its multiply-adds are made of, for the ceiling.
        weight_bytes: bytes of its weight, scales included, for (N, K).
        build: from W bf16 [N, K], its calls, each a copy in memory of its own.

    """

    arithmetic: Arithmetic
    weight_bytes: Callable[[int, int], int]
    build: Callable[[torch.Tensor], Iterator[Linear]]


def symmetric_codes(weight: torch.Tensor, bits: int, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest, a scale per output channel or per `group` columns: int8 [N, K] and float32 [N, groups]."""
    outputs, columns = weight.shape
    top = 2 ** (bits - 1) - 1
    grouped = weight.float().view(outputs, -1, group or columns)
    scale = grouped.abs().amax(-1, keepdim=True) / top
    codes = (grouped / scale).round().clamp(-top - 1, top)
    return codes.view(outputs, columns).to(torch.int8), scale.squeeze(-1)


def _require(reason: str | None) -> None:
    if reason is not None:
        raise UnavailableError(reason)


def _copies(tensors: Sequence[torch.Tensor], call: Callable[..., torch.Tensor]) -> Iterator[Linear]:
    """Endless calls of call(x, *tensors), each with a copy of the tensors."""
    while True:
        own = [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]
        yield lambda x, own=own: call(x, *own)  # type: ignore[misc]


# --- ours -------------------------------------------------------------------------------------------------------------
def resq_plan(site: SiteName, columns: int) -> tuple[LinearPlan, int]:
    """What `resq quantize` with its default options makes of a site with `columns` input columns, and its low bits."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=columns,
        intermediate_size=columns,
        head_dim=HEAD_DIM,
        num_attention_heads=columns // HEAD_DIM,
        num_key_value_heads=columns // HEAD_DIM,
        num_hidden_layers=1,
    )
    options = QuantizeOptions.checked(model="benchmark", output=Path("benchmark"))
    chosen = build_sites(adapter_for(config), options)[site]
    return linear_plan(chosen, columns, HEAD_DIM), chosen.weight_low_bits


def _resq(site: SiteName) -> Callable[[torch.Tensor], Iterator[Linear]]:
    def build(weight: torch.Tensor) -> Iterator[Linear]:
        plan, low_bits = resq_plan(site, weight.shape[1])
        segments, group_bits, k = plan.flat_segments(), list(plan.group_bits), plan.hadamard_k
        matrix = hadamard_matrix(k).float() if k > 1 else None
        # The columns of W meet x after its online Hadamard H: x·Wᵀ = (x·H)·(W·H)ᵀ.
        rotated = ops.hadamard(weight.float(), plan.hadamard_groups, matrix) if plan.hadamard_groups else weight.float()
        low, low_scale = symmetric_codes(rotated[:, plan.part_index(0)], low_bits)
        high, high_scale = symmetric_codes(rotated[:, plan.part_index(1)], 8)
        outputs = weight.shape[0]
        stored = pack_int4(low) if low_bits == 4 else low
        scales = torch.stack([low_scale[:, 0], high_scale[:, 0]])
        words = ops.plan_tensor(segments, group_bits, plan.hadamard_groups)
        while True:
            # Packed anew, not cloned: pack_weight chooses the pages that a loaded layer has.
            packed, sums = ops.pack_weight(stored, high, low_bits, outputs, segments)
            own = packed, scales.clone(), sums
            yield lambda x, own=own: ops.linear_planned(x, *own, None, words, matrix)  # type: ignore[misc, call-arg]

    return build


def _resq_bytes(site: SiteName) -> Callable[[int, int], int]:
    def count(outputs: int, columns: int) -> int:
        plan, low_bits = resq_plan(site, columns)
        low, high = plan.part_columns
        return outputs * (low * low_bits // 8 + high + 8 + 4 * len(plan.runs))

    return count


# --- the others -------------------------------------------------------------------------------------------------------
def _bf16(weight: torch.Tensor) -> Iterator[Linear]:
    return _copies((weight,), torch.nn.functional.linear)


def _bf16_vllm(weight: torch.Tensor) -> Iterator[Linear]:
    _require(stock_ops.op_reason("create_onednn_mm_handler", "onednn_mm"))
    return (stock_ops.onednn_bf16(weight) for _ in iter(int, 1))


def _w8a8_onednn(weight: torch.Tensor) -> Iterator[Linear]:
    _require(stock_ops.op_reason("create_onednn_scaled_mm_handler", "onednn_scaled_mm"))
    codes, scale = symmetric_codes(weight, 8)
    return (stock_ops.onednn_int8(codes, scale) for _ in iter(int, 1))


def _w8a8_amx(weight: torch.Tensor) -> Iterator[Linear]:
    _require(stock_ops.sgl_reason())
    codes, scale = symmetric_codes(weight, 8)
    return _copies((stock_ops.sgl_pack(codes), scale.flatten()), stock_ops.sgl_int8_linear)


def _unsigned_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = symmetric_codes(weight, 4, stock_ops.GROUP)
    return codes.int() + 8, scale.t().contiguous().bfloat16()


def _w4a16(weight: torch.Tensor) -> Iterator[Linear]:
    _require(stock_ops.op_reason("cpu_gemm_wna16"))
    codes, scale = _unsigned_groups(weight)
    return _copies((stock_ops.wna16_pack(codes), scale), stock_ops.wna16_linear)


def _w4a8_amx(weight: torch.Tensor) -> Iterator[Linear]:
    _require(stock_ops.int4_reason())
    codes, scale = _unsigned_groups(weight)
    return _copies(stock_ops.int4_pack(codes, scale), stock_ops.int4_linear)


def _zentorch(kind: str, folder: Path | None) -> Callable[[torch.Tensor], Iterator[Linear]]:
    def build(weight: torch.Tensor) -> Iterator[Linear]:
        _require(stock_ops.zentorch_reason(folder))
        if kind == "bf16":
            return _copies((stock_ops.zentorch_bf16_pack(weight),), stock_ops.zentorch_bf16_linear)
        if kind == "w8a8":
            codes, scale = symmetric_codes(weight, 8)
            return _copies((codes, scale.flatten().bfloat16()), stock_ops.zentorch_int8_linear)
        codes, scale = symmetric_codes(weight, 4, stock_ops.GROUP)
        packed, scales = stock_ops.zentorch_int4_pack(codes), scale.t().contiguous().bfloat16()
        if kind == "w4a8":
            return _copies((packed.view(torch.int8), scales), stock_ops.zentorch_int8_linear)
        return _copies((packed.t(), scales), stock_ops.zentorch_int4_linear)

    return build


def _bf16_bytes(outputs: int, columns: int) -> int:
    return 2 * outputs * columns


def _int8_bytes(outputs: int, columns: int) -> int:
    return outputs * (columns + 4)


def _int4_bytes(outputs: int, columns: int) -> int:
    return outputs * columns // 2 + 2 * outputs * columns // stock_ops.GROUP


def contenders(zentorch: Path | None = None) -> dict[str, Contender]:
    """All of them by name; ours begin with "resq". `zentorch`: a folder where that package is installed apart."""
    return {
        "resq": Contender("int8", _resq_bytes("qkv"), _resq("qkv")),
        "resq-down": Contender("int8", _resq_bytes("down"), _resq("down")),
        "bf16": Contender("bf16", _bf16_bytes, _bf16),
        "bf16-vllm": Contender("bf16", _bf16_bytes, _bf16_vllm),
        "w8a8-onednn": Contender("int8", _int8_bytes, _w8a8_onednn),
        "w8a8-amx": Contender("int8", _int8_bytes, _w8a8_amx),
        "cpu_gemm_wna16": Contender("bf16", _int4_bytes, _w4a16),
        "int4_scaled_mm_cpu": Contender("int8", _int4_bytes, _w4a8_amx),
        "zentorch-bf16": Contender("bf16", _bf16_bytes, _zentorch("bf16", zentorch)),
        "zentorch-w8a8": Contender("int8", _int8_bytes, _zentorch("w8a8", zentorch)),
        "zentorch-w4a16": Contender("bf16", _int4_bytes, _zentorch("w4a16", zentorch)),
        "zentorch-w4a8": Contender("int8", _int4_bytes, _zentorch("w4a8", zentorch)),
    }


def relative_error(linear: Linear, weight: torch.Tensor) -> float:
    """Root mean square of y − x·Wᵀ over that of x·Wᵀ, for random x: whether the weight was laid out rightly."""
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.float() @ weight.float().t()
    return float((linear(x).float() - exact).norm() / exact.norm())


def checked(name: str, contender: Contender, weight: torch.Tensor) -> tuple[Iterator[Linear], float]:
    """The contender's calls and the error of the first.

    Raises:
        UnavailableError: when it cannot be loaded or called here, or computes something else.
    """
    try:
        calls = contender.build(weight)
        error = relative_error(next(calls), weight)
    except RuntimeError as refused:
        raise UnavailableError(str(refused).partition("\n")[0]) from refused
    if not error < LARGEST_ERROR:
        raise UnavailableError(f"{name} computes something else here: relative error {error:.2f}")
    return calls, error
