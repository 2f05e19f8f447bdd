"""Every method by name, in the order of the comparison's table, and ResQ's ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from offline.methods.lqer import LQER
from offline.methods.method import FloatModel, Method
from offline.methods.plain import Quik, SmoothQuant, Uniform
from offline.methods.resq import ResQ, TrainedResQ
from offline.methods.rotated import QuaRot, SpinQuant
from resq_vllm.errors import ResQError

# Of the channels at 2 bits in the three-way split (arXiv 2412.14363, table 5: 2, 4 and 8 bits).
LOWEST_FRACTION = 0.125


@dataclass(frozen=True)
class MethodOptions:
    """What a user sets for several methods at once.

    Attributes:
        high_fraction: share of the channels in 8 bits (ResQ, QUIK).
        train_tokens: token budget of trained rotations (SpinQuant, trained ResQ).
        lr: their first step size.
        kv_bits: of ResQ's KV cache, one for all layers or one a layer.

    """

    high_fraction: float = 0.125
    train_tokens: int = 65_536
    lr: float = 1.5
    kv_bits: tuple[Literal[4, 8, 16], ...] = (4,)


def methods(options: MethodOptions | None = None) -> dict[str, Method]:
    """The rows of ``resq compare``."""
    chosen = options or MethodOptions()
    resq = _resq(chosen)
    known: list[Method] = [
        FloatModel(),
        Uniform(),
        Uniform(name="gptq", label="GPTQ", gptq=True, source="arXiv 2210.17323 (clip search on the weights)"),
        SmoothQuant(),
        Quik(high_fraction=chosen.high_fraction),
        QuaRot(),
        SpinQuant(train_tokens=chosen.train_tokens, lr=chosen.lr),
        LQER(),
        LQER(name="lqer-mxint", label="LQER (MXINT)", form="mxint"),
        LQER(name="l2qer", label="L²QER (int4 g128)", scaled=True),
        LQER(name="l2qer-mxint", label="L²QER (MXINT)", scaled=True, form="mxint"),
        paper_recipe(resq),
        resq,
        TrainedResQ(
            high_fraction=chosen.high_fraction, kv_bits=resq.kv_bits, train_tokens=chosen.train_tokens, lr=chosen.lr
        ),
        replace(resq, name="resq-248", label="ResQ, 2/4/8 bits", lowest_fraction=LOWEST_FRACTION),
        replace(resq, name="resq-a8", label="ResQ, 8-bit o and down inputs", o_scales="token8", down_act_bits=8),
        replace(resq, name="resq-lm8", label="ResQ, 8-bit lm_head", lm_head_bits=8),
        replace(resq, name="resq-lm4", label="ResQ, 4.5-bit lm_head", lm_head_bits=4),
    ]
    return {method.name: method for method in known}


def ablations(options: MethodOptions | None = None) -> dict[str, Method]:
    """ResQ with one choice changed at a time."""
    resq = _resq(options or MethodOptions())
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "no-ua": ("random U_A instead of PCA", {"residual_basis": "random"}),
        "no-ub": ("U_B = 1", {"value_basis": "identity"}),
        "no-uc": ("U_C = 1", {"key_basis": "identity"}),
        "no-ud": ("no Hadamard before down_proj", {"hadamard": False}),
        "no-rotation": ("PCA without random rotations inside", {"random_rotation": False}),
        "no-down-high": ("no high part in down_proj", {"down_high_fraction": 0.0}),
        "no-compensation": ("weights rounded, not compensated", {"compensate": False}),
        "rtn": ("weights rounded to nearest", {"rtn": True}),
        "o-token8": ("o_proj inputs: one 8-bit scale a token", {"o_scales": "token8"}),
        "o-kv": ("o_proj inputs: scales per kv head's query heads", {"o_scales": "kv"}),
        "o-head": ("o_proj inputs: scales per head (paper)", {"o_scales": "head"}),
        "down-a8": ("down_proj inputs in 8 bits", {"down_act_bits": 8}),
        "high-0": ("no high part", {"high_fraction": 0.0}),
        "high-1/16": ("1/16 high", {"high_fraction": 1 / 16}),
        "high-3/16": ("3/16 high", {"high_fraction": 3 / 16}),
        "high-1/4": ("1/4 high", {"high_fraction": 1 / 4}),
        "more-down": (
            "3/16 high in down_proj, 1/16 elsewhere",
            {"high_fraction": 1 / 16, "down_high_fraction": 3 / 16},
        ),
        "less-down": (
            "1/16 high in down_proj, 5/32 elsewhere",
            {"high_fraction": 5 / 32, "down_high_fraction": 1 / 16},
        ),
        "low-2": ("2 low bits", {"low_bits": 2}),
        "low-3": ("3 low bits", {"low_bits": 3}),
        "kv-8": ("KV in 8 bits", {"kv_bits": (8,)}),
        "kv-16": ("KV in 16 bits", {"kv_bits": (16,)}),
        "cal-8": ("8 calibration sequences", {"calibration_samples": 8}),
        "cal-32": ("32 calibration sequences", {"calibration_samples": 32}),
    }
    found: dict[str, Method] = {}
    for name, (label, fields) in changes.items():
        found[f"resq-{name}"] = replace(resq, name=f"resq-{name}", label=f"ResQ: {label}", **fields)
    return found


def chosen_ablations(names: tuple[str, ...], options: MethodOptions | None = None) -> dict[str, Method]:
    """The ablations called ``names`` ("no-ua" or "resq-no-ua"), all of them for "all".

    Raises ResQError listing the known ones for any other name.
    """
    known = ablations(options)
    if "all" in names:
        return known
    found = {}
    for name in names:
        full = name if name in known else f"resq-{name}"
        if full not in known:
            short = ", ".join(method.removeprefix("resq-") for method in known)
            raise ResQError(f"--ablations: {name} unknown; give all, or some of {short}")
        found[full] = known[full]
    return found


def paper_recipe(resq: ResQ) -> ResQ:
    """ResQ as its paper has it: uniform 4 bits in down_proj under one full Hadamard scale, o_proj scales per head."""
    return replace(
        resq,
        name="resq-paper",
        label="ResQ, paper's recipe",
        o_scales="head",
        down_high_fraction=0.0,
        down_groups=1,
        compensate=False,
        max_tp=1,
        source="arXiv 2412.14363, section 4",
    )


def _resq(options: MethodOptions) -> ResQ:
    return ResQ(high_fraction=options.high_fraction, kv_bits=options.kv_bits)
