"""What a linear site's input, and K and V, go through at run time: a linear transform, then rounding.

The two halves are kept apart because they are used apart: Hessians see the transformed input unrounded (method §3), and
training sends gradients through the transform but past the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offline.models.attention import AttentionHook
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.reference import block_hadamard, kv_fake_quantize, round_activation

Transform = Callable[[torch.Tensor], torch.Tensor]


def identity(x: torch.Tensor) -> torch.Tensor:
    """x as it is: no transform, or no rounding."""
    return x


@dataclass(frozen=True)
class ActivationQuantizer:
    """A site's input x [..., K] of any float type.

    Attributes:
        transform: linear in x and differentiable, keeps the shape (an online Hadamard).
        rounding: the transformed x to the nearest values that the quantizer has, float32 or x's dtype.

    """

    transform: Transform = identity
    rounding: Transform = identity

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Both, in x's dtype."""
        return self.rounding(self.transform(x)).to(x.dtype)

    @classmethod
    def of_plan(cls, plan: LinearPlan) -> ActivationQuantizer:
        """The served quantizer: block Hadamard of the plan, then per-token asymmetric rounding by activation group."""
        groups = plan.hadamard_groups
        return cls(
            (lambda x: block_hadamard(x, groups)) if groups else identity, lambda x: round_activation(x.float(), plan)
        )


@dataclass(frozen=True)
class KVQuantizer:
    """One layer's K and V.

    Attributes:
        rotation: U_C [hd, hd], applied to q and k after RoPE, or None.
        key: rounding of the rotated k [..., T, hd].
        value: rounding of v [..., T, hd].

    """

    rotation: torch.Tensor | None = None
    key: Transform = identity
    value: Transform = identity

    @classmethod
    def of_layout(cls, layout: KVLayout, rotation: torch.Tensor | None) -> KVQuantizer:
        """The served cache: asymmetric per token, head and part, scales in float16."""

        def rounding(x: torch.Tensor) -> torch.Tensor:
            return kv_fake_quantize(x, layout)

        return cls(None if rotation is None else rotation.float(), rounding, rounding)

    def hook(self) -> AttentionHook:
        """As the attention hook of a :class:`offline.models.layer.LoadedLayer`."""

        def hook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if self.rotation is not None:
                q, k = q @ self.rotation.to(q.dtype), k @ self.rotation.to(k.dtype)
            return q, self.key(k).to(k.dtype), self.value(v).to(v.dtype)

        return hook
