"""A quantized linear layer as checkpoint tensors, and back.

Per module: ``weight_low`` (4 bit: uint8 [N, K_l/2], byte j = column 2j in the low nibble and 2j+1 in the high one;
8 bit: int8 [N, K_l]), ``weight_high`` int8 [N, K_h], ``weight_low_scale`` and ``weight_high_scale`` float32 [N]. A part
of no columns has no tensors. Format 2 adds: ``weight_low_scale`` is [N, groups] where the site has a ``weight_group``,
and a site of ``low_rank`` k has ``low_rank_a`` [K, k] and ``low_rank_b`` [k, N] in the model dtype. Format 3: an 8-bit
lm_head is such a module too, with a high part alone; format 4: one with a 4-bit low part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offline.quantize.lowrank import LowRank
from offline.quantize.mixed import QuantizedLinear
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.formats.weights import pack_int4, unpack_int4

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in the file looks like, or must: ``dtype`` None = any float type of 16 or 32 bits."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        dtype = "bfloat16, float16 or float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)}"

    def accepts(self, found: TensorSpec) -> bool:
        """Whether a tensor of the file fits."""
        return found.shape == self.shape and (
            found.dtype in FLOAT_DTYPES if self.dtype is None else found.dtype == self.dtype
        )


def linear_specs(module: str, rows: int, site: LinearSite) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of the tensors of ``module`` with ``rows`` output channels (all ranks together)."""
    specs: dict[str, TensorSpec] = {}
    if site.low:
        packed = site.weight_low_bits == 4
        width = site.low // 2 if packed else site.low
        specs[f"{module}.weight_low"] = TensorSpec(torch.uint8 if packed else torch.int8, (rows, width))
        scale = (rows, site.weight_groups) if site.weight_group else (rows,)
        specs[f"{module}.weight_low_scale"] = TensorSpec(torch.float32, scale)
    if site.high:
        specs[f"{module}.weight_high"] = TensorSpec(torch.int8, (rows, site.high))
        specs[f"{module}.weight_high_scale"] = TensorSpec(torch.float32, (rows,))
    if site.low_rank:
        specs[f"{module}.low_rank_a"] = TensorSpec(None, (site.low + site.high, site.low_rank))
        specs[f"{module}.low_rank_b"] = TensorSpec(None, (site.low_rank, rows))
    return specs


def linear_tensors(linear: QuantizedLinear, module: str, bias: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of ``module``, on the CPU; ``bias`` (model dtype [N]) is stored as it is.

    Raises ResQError when a 4-bit part has an odd number of columns.
    """
    tensors: dict[str, torch.Tensor] = {}
    if linear.low.shape[1]:
        if linear.low_bits == 4 and linear.low.shape[1] % 2:
            raise ResQError(
                f"{module}: {linear.low.shape[1]} 4-bit columns do not pair up into bytes; choose a high fraction that "
                "leaves an even number"
            )
        low = pack_int4(linear.low) if linear.low_bits == 4 else linear.low
        tensors[f"{module}.weight_low"] = low.contiguous()
        tensors[f"{module}.weight_low_scale"] = linear.low_scale.float().contiguous()
    if linear.high.shape[1]:
        tensors[f"{module}.weight_high"] = linear.high.contiguous()
        tensors[f"{module}.weight_high_scale"] = linear.high_scale.float().contiguous()
    if linear.correction is not None and linear.correction.rank:
        tensors[f"{module}.low_rank_a"] = linear.correction.a.contiguous()
        tensors[f"{module}.low_rank_b"] = linear.correction.b.contiguous()
    if bias is not None:
        tensors[f"{module}.bias"] = bias.contiguous()
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def linear_from_tensors(
    get: Callable[[str], torch.Tensor], module: str, rows: int, site: LinearSite, plan: LinearPlan
) -> QuantizedLinear:
    """The inverse of :func:`linear_tensors`: ``get`` returns a tensor by name, ``plan`` covers all ranks' columns."""
    low, high = torch.empty(rows, 0, dtype=torch.int8), torch.empty(rows, 0, dtype=torch.int8)
    low_scale, high_scale = torch.zeros(rows), torch.zeros(rows)
    if site.low:
        low = get(f"{module}.weight_low")
        low = unpack_int4(low) if site.weight_low_bits == 4 else low
        low_scale = get(f"{module}.weight_low_scale")
    if site.high:
        high, high_scale = get(f"{module}.weight_high"), get(f"{module}.weight_high_scale")
    correction = LowRank(get(f"{module}.low_rank_a"), get(f"{module}.low_rank_b")) if site.low_rank else None
    return QuantizedLinear(
        low, high, low_scale, high_scale, plan, site.weight_low_bits, site.weight_high_bits, correction
    )
