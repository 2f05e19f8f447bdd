"""Rival kernels, called as vLLM 0.32 calls them: its own CPU ops and zentorch's.

The one module of the benchmarks that touches vLLM's kernels. `…_reason()` says in one sentence why an op cannot be
measured here, None where it can. Shapes: x [M, K] bf16, weight [N, K], y [M, N] bf16.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]
GROUP = 128


def _vllm_ops() -> Any:
    return importlib.import_module("vllm._custom_ops")


def op_reason(*names: str) -> str | None:
    """Why vLLM's compiled ops `names` cannot be called."""
    try:
        _vllm_ops()
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    missing = [name for name in names if not hasattr(torch.ops._C, name)]
    return f"this vLLM has no op {', '.join(missing)}" if missing else None


def _amx_reason() -> str | None:
    return None if torch.cpu._is_amx_tile_supported() else "this CPU has no AMX, for which alone the kernel is made"


# --- bf16 -------------------------------------------------------------------------------------------------------------
def onednn_bf16(weight: torch.Tensor) -> Linear:
    """vLLM's linear layer of an unquantized model: the weight prepacked by oneDNN."""
    ops = _vllm_ops()
    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


# --- W8A8 -------------------------------------------------------------------------------------------------------------
def onednn_int8(codes: torch.Tensor, scale: torch.Tensor) -> Linear:
    """vLLM's W8A8 layer with dynamic per-token symmetric activations through oneDNN. codes int8 [N, K], scale [N]."""
    ops = _vllm_ops()
    handler = ops.create_onednn_scaled_mm(codes.t(), scale.view(-1, 1), torch.bfloat16, True, False, 32)
    outputs = codes.shape[0]

    def linear(x: torch.Tensor) -> torch.Tensor:
        x_codes, x_scale, x_zero = ops.onednn_scaled_int8_quant(x)
        y = torch.empty((x.shape[0], outputs), dtype=x.dtype)
        return ops.onednn_scaled_mm(handler, x_codes, y, x_scale, x_zero, None, None)

    return linear


def sgl_int8_reason() -> str | None:
    """vLLM takes this W8A8 kernel instead of oneDNN's where the CPU has AMX."""
    return op_reason("convert_weight_packed", "int8_scaled_mm_with_quant") or _amx_reason()


def sgl_int8_pack(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops._C.convert_weight_packed(codes)


def sgl_int8_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, None, torch.bfloat16, True)


# --- 4-bit weights in groups of GROUP ---------------------------------------------------------------------------------
def _pack_columns(codes: torch.Tensor) -> torch.Tensor:
    """codes 0…15 int32 [K, N] -> int32 [K, N/8], eight neighbours of a row in one word, the first lowest."""
    words = torch.zeros((codes.shape[0], codes.shape[1] // 8), dtype=torch.int32)
    for place in range(8):
        words |= codes[:, place::8] << (4 * place)
    return words


def wna16_pack(codes: torch.Tensor) -> torch.Tensor:
    """codes 0…15 (zero point 8) int32 [N, K] -> the layout of cpu_gemm_wna16: blocks of 16 output channels."""
    outputs, columns = codes.shape
    words = _pack_columns(codes.t())
    return words.view(columns, outputs // 16, 2).permute(1, 0, 2).reshape(outputs // 16, columns * 2).contiguous()


def wna16_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale bf16 [K/GROUP, N]."""
    hint = "vec" if _amx_reason() else "amx"
    return _vllm_ops().cpu_gemm_wna16(x, packed, scale, None, None, 8, hint)


def int4_reason() -> str | None:
    """vLLM takes this W4A8 kernel for GPTQ and AWQ checkpoints where the CPU has AMX, unless VLLM_CPU_INT4_W4A8=0."""
    return op_reason("convert_weight_packed_scale_zp", "int4_scaled_mm_cpu") or _amx_reason()


def int4_pack(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes 0…15 (zero point 8) int32 [N, K], scale [K/GROUP, N] -> weight, zero points and scales as the op has them."""
    ops = _vllm_ops()
    awq_order = [0, 2, 4, 6, 1, 3, 5, 7]

    def awq(values: torch.Tensor) -> torch.Tensor:
        rows, columns = values.shape
        return _pack_columns(values.view(rows, columns // 8, 8)[:, :, awq_order].reshape(rows, columns))

    zeros = torch.full(scale.shape, 8, dtype=torch.int32)
    weight, zero, blocked = ops.convert_weight_packed_scale_zp(
        awq(codes.t().contiguous()), awq(zeros), scale, ops.CPUQuantAlgo.AWQ
    )
    return weight, zero, blocked


def int4_linear(x: torch.Tensor, weight: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _vllm_ops().int4_scaled_mm_cpu(x, weight, zero, scale, None)


# --- zentorch ---------------------------------------------------------------------------------------------------------
def zentorch_reason(folder: Path | None) -> str | None:
    """Import zentorch (from `folder` where it is installed apart: `pip install --target`); why it cannot be."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError) as error:
        return f"zentorch cannot be imported ({error})"
    names = ("zentorch_linear_unary", "zentorch_dynamic_qlinear", "zentorch_woq_linear")
    missing = [name for name in names if not hasattr(torch.ops.zentorch, name)]
    return f"this zentorch has no op {', '.join(missing)}" if missing else None


def zentorch_bf16_pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.zentorch.zentorch_weight_prepack_for_linear(weight)


def zentorch_bf16_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.zentorch.zentorch_linear_unary(x, packed, None, is_weight_prepacked=True)


def zentorch_int8_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dynamic symmetric activations; codes int8 [N, K], scale bf16 [N] — or packed int4 and [K/GROUP, N] (W4A8)."""
    return torch.ops.zentorch.zentorch_dynamic_qlinear(x, codes, scale, None)


def zentorch_int4_pack(codes: torch.Tensor) -> torch.Tensor:
    """codes −8…7 int8 [N, K] -> int32 [N, K/8] as zentorch packs them."""
    return torch.ops.zentorch.zentorch_woq_repack_weight(codes.contiguous())


def zentorch_int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W4A16; packed [K/8, N] (a transposed view), scale bf16 [K/GROUP, N]."""
    return torch.ops.zentorch.zentorch_woq_linear(x, packed, scale, None, None)
