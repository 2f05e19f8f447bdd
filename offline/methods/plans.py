"""Plans and quantizers that several methods make their sites of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offline.methods.method import SiteQuantization
from offline.quantize.activations import ActivationQuantizer, KVQuantizer, Transform
from offline.quantize.linear_weights import PartWeights
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.plan import HIGH, LOW, LinearPlan, Segment


def uniform_plan(columns: int, bits: int) -> LinearPlan:
    """One part, one activation scale a token."""
    return LinearPlan((Segment(columns, LOW, 0),), (bits,))


def chosen_plan(columns: int, high: torch.Tensor, bits: tuple[int, int]) -> LinearPlan:
    """The columns ``high`` int64 [n] in a part and an activation group of their own, wherever they stand."""
    is_high = torch.zeros(columns, dtype=torch.bool)
    is_high[high.cpu()] = True
    segments: list[Segment] = []
    for column in is_high.tolist():
        part = HIGH if column else LOW
        if segments and segments[-1].part == part:
            segments[-1] = Segment(segments[-1].columns + 1, part, part)
        else:
            segments.append(Segment(1, part, part))
    return LinearPlan(tuple(segments), bits)


def planned_site(
    plan: LinearPlan,
    weight_bits: Sequence[int],
    gptq: bool,
    transform: Transform | None = None,
    rounding: Transform | None = None,
) -> SiteQuantization:
    """Weights and activations by ``plan``.

    ``weight_bits``: of each part. ``transform`` goes before rounding (default: the plan's online Hadamard);
    ``rounding`` replaces the plan's own.
    """
    served = ActivationQuantizer.of_plan(plan)
    mean = sum(s.columns * plan.group_bits[s.group] for s in plan.segments) / plan.columns
    return SiteQuantization(
        PartWeights(plan, weight_bits, gptq),
        ActivationQuantizer(transform or served.transform, rounding or served.rounding),
        mean,
    )


def uniform_site(columns: int, bits: int, gptq: bool, rounding: Transform | None = None) -> SiteQuantization:
    """``bits`` for weights (per output channel) and activations (per token)."""
    return planned_site(uniform_plan(columns, bits), (bits,), gptq, rounding=rounding)


def uniform_kv(head_dim: int, bits: int, rotation: torch.Tensor | None = None) -> KVQuantizer:
    """Asymmetric per token and head, as the packed cache keeps it; ``rotation``: of q and k."""
    return KVQuantizer.of_layout(KVLayout(head_dim, 0, bits), rotation)
