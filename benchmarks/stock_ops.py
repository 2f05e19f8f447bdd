"""Rival kernels, called as vLLM 0.32 calls them: its own CPU ops and zentorch's.

The one module of the benchmarks that touches vLLM's kernels. `…_reason()` says in one sentence why an op cannot be
measured here, None where it can. Shapes: x [M, K] bf16, weight [N, K], y [M, N] bf16.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]
GROUP = 128


@cache
def _vllm_ops() -> Any:
    # Linux lets a process use AMX only once it has asked; vLLM's kernels leave that to the first oneDNN product.
    torch.cpu._init_amx()
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


def sgl_reason() -> str | None:
    """vLLM takes these where the CPU has AMX: for W8A8 instead of oneDNN's, for bf16 where the weight is small."""
    return op_reason("convert_weight_packed", "int8_scaled_mm_with_quant", "weight_packed_linear") or _amx_reason()


def sgl_pack(weight: torch.Tensor) -> torch.Tensor:
    """Weight bf16 or codes int8 [N, K] in tiles."""
    return torch.ops._C.convert_weight_packed(weight)


def sgl_bf16_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """packed: square, so that N is x's K."""
    return _vllm_ops().weight_packed_linear_cpu(x, packed, x.shape[1], None)


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
    """codes 0…15 (zero point 8) int32 [N, K], scale [K/GROUP, N] -> weight, zero points, scales for int4_linear."""
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


# --- attention --------------------------------------------------------------------------------------------------------
class CPUAttention:
    """vLLM's CPU attention as its backend calls it: head-major pages, the ISA it chooses, its schedule of a step.

    Args:
        kv_cache_dtype: "auto" for bf16 pages, or "fp8".

    Raises:
        NotImplementedError: by vLLM itself, for a cache that it does not have on this CPU.

    """

    def __init__(self, kv_cache_dtype: str, heads: int, kv_heads: int, head_dim: int, block_tokens: int) -> None:
        backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
        self._ops = _vllm_ops()
        self._sizes = (heads, kv_heads, head_dim)
        self._dtype = kv_cache_dtype
        self._block_tokens = block_tokens
        self.isa: str = backend._get_attn_isa(torch.bfloat16, block_tokens, head_dim, kv_cache_dtype)

    def cache(self, blocks: int) -> torch.Tensor:
        """An empty cache [blocks, kv_heads, 2·block_tokens, head_dim]: K in the first half of dimension 2, then V."""
        _, kv_heads, head_dim = self._sizes
        dtype = torch.bfloat16 if self._dtype == "auto" else torch.uint8
        return torch.zeros(blocks, kv_heads, 2 * self._block_tokens, head_dim, dtype=dtype)

    def schedule(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """What vLLM computes once a step, for all layers."""
        heads, kv_heads, head_dim = self._sizes
        return self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            seq_lens=seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=self._dtype,
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """key, value [T, kv_heads, head_dim] into the pages."""
        keys, values = cache.chunk(2, dim=2)
        self._ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, self.isa, kv_cache_dtype=self._dtype)

    def attend(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        schedule: torch.Tensor,
        scale: float,
    ) -> None:
        """Causal attention of query [T, heads, head_dim] into out."""
        keys, values = cache.chunk(2, dim=2)
        self._ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
            kv_cache_dtype=self._dtype,
        )
