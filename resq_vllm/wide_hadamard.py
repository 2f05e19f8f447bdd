"""The online Hadamard of blocks too wide for our kernel, which holds a block in one CTA's shared memory (csrc/cuda).

The package fast-hadamard-transform does the power-of-two factor, a float32 product the dense one H_k: two launches and
a float32 row in device memory. Reached with one group: 14336 columns take 121 KiB with H_28's second buffer and 28672
columns 233, where Ada has 99 and Hopper 227. The default of 8 groups fits everywhere. Not run on a GPU.
"""

# No "from __future__ import annotations": torch reads the op's schema from the types below.
import importlib
import logging
from functools import cache
from typing import Any

import torch

from resq_vllm import fused
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.hadamard import hadamard_matrix
from resq_vllm.log import log_once

# fast-hadamard-transform pads shorter rows with zeros, to another transform.
LEAST_FACTOR = 8


@cache
def needed(plan: LinearPlan, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device``'s own kernel cannot transform a row of ``plan``, found by quantizing one; logged.

    Raises ResQError with one sentence, to follow the layer's name, where there is no other way.
    """
    if device.type != "cuda" or not plan.hadamard_groups:
        return False
    why = _refusal(plan, device, dtype, transform=True)
    if why is None:
        return False
    width = plan.columns // plan.hadamard_groups // plan.hadamard_k
    if width < LEAST_FACTOR:
        raise ResQError(f"{why} (fast-hadamard-transform has no transform of {width} columns either)")
    try:
        _package()
    except ImportError as missing:
        raise ResQError(f"{why}, or install fast-hadamard-transform ({missing})") from missing
    beside = _refusal(plan, device, torch.float32, transform=False)
    if beside is not None:
        raise ResQError(f"{why} (nor can its values be quantized apart: {beside})")
    log_once(
        logging.WARNING,
        f"ResQ: the Hadamard transform of {plan.columns} columns runs in fast-hadamard-transform, in launches of its "
        f"own, since {why}",
    )
    return True


def _refusal(plan: LinearPlan, device: torch.device, dtype: torch.dtype, transform: bool) -> str | None:
    """What our kernel says of a row of zeros, None where it takes it."""
    k, groups = (plan.hadamard_k, plan.hadamard_groups) if transform else (1, 0)
    dense = hadamard_matrix(k).float().to(device) if k > 1 else None
    row = torch.zeros(1, plan.columns, device=device, dtype=dtype)
    try:
        fused.quantize_pack(row, plan.flat_segments(), plan.group_bits, groups, dense, plan.weight_group)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def wide_hadamard(x: torch.Tensor, groups: int, hadamard_k: torch.Tensor | None) -> torch.Tensor:
    """Block-diagonal Hadamard of x [..., groups·n], float32 (reference.block_hadamard); hadamard_k as in ops.linear."""
    columns = x.shape[-1]
    n = columns // groups
    k = 1 if hadamard_k is None else hadamard_k.shape[0]
    y = _package().hadamard_transform(x.float().reshape(-1, n // k), 1.0).view(-1, k, n // k)
    if hadamard_k is not None:
        y = torch.matmul(hadamard_k, y)
    return (y / n**0.5).view(x.shape)


def _package() -> Any:
    return importlib.import_module("fast_hadamard_transform")


def _wide_hadamard_fake(x: torch.Tensor, groups: int, hadamard_k: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


_library = torch.library.Library("resq", "FRAGMENT")
_library.define("wide_hadamard" + torch.library.infer_schema(wide_hadamard, mutates_args=()))
_library.impl("wide_hadamard", wide_hadamard, "CompositeExplicitAutograd")
torch.library.register_fake("resq::wide_hadamard", _wide_hadamard_fake)
