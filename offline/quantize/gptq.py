"""GPTQ (arXiv 2210.17323) for a weight whose columns are [low | high], each part with its own bits and scales.

Columns are visited left to right, so 4-bit columns push their error into the 8-bit ones, which can absorb it. Scales
are fixed before the sweep; there is no reordering by activation size (the parts already are that order).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from offline.finite import all_finite
from offline.quantize.triangular import InPlaceCholesky, permute_
from offline.quantize.weights import WeightGrid, code_range
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import LinearPlan

logger = logging.getLogger("resq.quantize")

DAMPING = 0.01
BLOCK = 128


@dataclass(frozen=True)
class HessianFactor:
    """U of H⁻¹ = UᵀU for the damped Hessian of one input, in the plan's part order (low first: `column_order`).

    Layers that share an input (q, k, v; gate, up) share this: the factorisation is the expensive part.

    Attributes:
        upper: float32 [K, K], upper triangular.
        damping: the share of the mean diagonal that was added (0.01 unless the Hessian was too nearly singular).

    """

    upper: torch.Tensor
    damping: float


def column_order(plan: LinearPlan) -> list[int]:
    """x's column numbers part by part, lowest precision first: the order in which GPTQ visits them."""
    return [column for part in sorted({s.part for s in plan.segments}) for column in plan.part_index(part)]


def factorise(
    hessian: torch.Tensor, plan: LinearPlan, damping: float = DAMPING, name: str = "layer", consume: bool = False
) -> HessianFactor:
    """Damp, invert and factorise a Hessian.

    Args:
        hessian: float32 or float64 [K, K] in x's column order (:mod:`offline.quantize.hessian`).
        plan: gives the order of the columns.
        damping: added to the diagonal, as a share of its mean.
        name: the layer, for messages.
        consume: let the factor take the Hessian's memory.

    A column that calibration never reached (zero diagonal) gets a diagonal of 1 and no neighbours: it is rounded to
    nearest. float32 is tried first, then float64, then ten times the damping, up to once the mean diagonal.

    Raises ResQError naming the layer when the Hessian is not finite or never factorises.

    """
    if not all_finite(hessian):
        raise ResQError(
            f"{name}: the calibration Hessian holds NaN or infinite values; check the model's weights, or quantize "
            "with --rtn"
        )
    ordered = hessian if consume else hessian.clone()
    # Last column first: with H = L·Lᵀ in that order, L⁻¹ read backwards is the upper U of H⁻¹ = UᵀU.
    permute_(ordered, torch.tensor(column_order(plan)).flip(0).to(ordered.device))
    diagonal = ordered.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean(dtype=torch.float64))
    for attempt, (dtype, share) in enumerate(_attempts(damping)):
        inverse = _inverse_factor(ordered, dtype, share * mean)
        if inverse is not None:
            if attempt:
                logger.warning("%s: the Hessian factorised only as %s with damping %g", name, dtype, share)
            permute_(inverse, torch.arange(len(inverse) - 1, -1, -1, device=inverse.device))
            return HessianFactor(inverse.float(), share)
    raise ResQError(
        f"{name}: the calibration Hessian is not positive definite even with damping; give more calibration text, or "
        "quantize with --rtn"
    )


def _attempts(damping: float) -> list[tuple[torch.dtype, float]]:
    shares = [damping]
    while shares[-1] < 1:
        shares.append(min(1.0, max(DAMPING, shares[-1] * 10)))
    return [(torch.float32, damping), *((torch.float64, share) for share in shares)]


def _inverse_factor(matrix: torch.Tensor, dtype: torch.dtype, ridge: float) -> torch.Tensor | None:
    """L⁻¹ of ``matrix`` + ridge·I, in its place if ``dtype`` is its own; None, and it is as before, when that fails."""
    work = matrix.to(dtype)
    factor = InPlaceCholesky(work, ridge)
    # A factor may "succeed" with a vanishing pivot that a later division turns into infinity.
    if factor.complete and 1 / float(work.diagonal().min()) < torch.finfo(torch.float32).max:
        return factor.invert_()
    factor.restore()
    return None


def gptq(weight: torch.Tensor, factor: HessianFactor, grid: WeightGrid, block: int = BLOCK) -> torch.Tensor:
    """Codes int8 [N, K] of ``weight`` float32 [N, K] on ``grid``, swept against its input's factor.

    Columns in the factor's order (lowest precision first). For column i: q = round(w_i), e = (w_i − s·q)/U_ii, and
    every later column j loses e·U_ij (GPTQ, algorithm 1).
    """
    columns = weight.shape[1]
    if factor.upper.shape[0] != columns:
        raise ResQError(f"a Hessian of {factor.upper.shape[0]} columns does not fit a weight of {columns}")
    rows = grid.row.tolist()
    ranges = [code_range(bits) for bits in grid.bits]
    # Transposed, a column of the weight is contiguous: the sweep reads and writes one at a time.
    rest = weight.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(rest.shape, dtype=torch.int8, device=rest.device)
    whole = factor.upper.to(rest.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        upper = whole[start:stop, start:stop]
        errors = torch.empty(stop - start, weight.shape[0], device=rest.device)
        for i in range(stop - start):
            row = rows[start + i]
            scale, column = grid.scale[row], rest[start + i]
            rounded = (column / scale).round_().clamp_(*ranges[row])
            codes[start + i] = rounded
            errors[i] = (column - rounded * scale) / upper[i, i]
            rest[start + i + 1 : stop].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        rest[stop:].addmm_(whole[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()
