"""A whole model's loss with rounded activations and KV, as a differentiable function of its rotations.

Weights are not rounded: GPTQ follows, and SpinQuant (arXiv 2405.16406, section 4.3) trains for it with 16-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from offline.bases.bases import LayerRotation
from offline.models.layer import LoadedLayer
from offline.models.runner import LayerRunner
from offline.quantize.activations import ActivationQuantizer, KVQuantizer, Transform, identity
from offline.rotate.fuse import fold_norms, rotate_layer, rotate_rows
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SiteName

# What is minimised, in nats a token, over the positions that predict a token of the text. "cross_entropy": of that
# token, the loss of SpinQuant. "divergence": KL(p ‖ q) of the unrounded model's prediction p from the rounded one's q,
# which is what rounding adds to the cross entropy of text that follows p. Its gradient is 0 without rounding, so single
# rounding errors bring less noise into it (measured on stories3M: the cosine of two batches' gradients is 0.47 against
# 0.22), for one more forward pass.
Objective = Literal["cross_entropy", "divergence"]
# Positions whose logits exist at one time: [512, 128k vocabulary] in float32 is 256 MB.
LOGIT_ROWS = 512
# Index of a layer -> its float tensors by full name.
LayerTensors = Callable[[int], Mapping[str, torch.Tensor]]


class _StraightThroughRound(TorchFunctionMode):
    """While active, torch.round has the gradient of the identity."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.round, torch.Tensor.round):
            # r − x is exact in floating point, so the sum is r.
            return args[0] + (result - args[0]).detach()
        return result


def straight_through(rounding: Transform) -> Transform:
    """``rounding`` with a gradient: torch.round inside it passes gradients on as the identity does (arXiv 1308.3432).

    So x̂ = s·(q − z) has ∂x̂/∂x = 1 and ∂x̂/∂s = (q − z) − x/s, as in LSQ (arXiv 1902.08153, equation 3), with s
    itself a function of the token's extremes: lowering the range is what a rotation can do about outliers, and a
    gradient that takes the whole error as a constant does not see it (measured on the stories3M model: gradients of two
    batches of 3.9k tokens then have a cosine of 0.03, with it 0.22). A rounding that autograd cannot follow at all
    gets the gradient of the identity.
    """
    if rounding is identity:
        return identity

    def rounded(x: torch.Tensor) -> torch.Tensor:
        with _StraightThroughRound():
            y = rounding(x)
        return x + (y - x).detach() if x.requires_grad and not y.requires_grad else y

    return rounded


class RotatedModel:
    """Transformers' own layers, norms folded, with the weights fused anew from the rotations in every call.

    Memory: the model once in float32, the hidden states [B, T, d] between the layers, one layer's fused weights and
    graph (each layer is computed again in the backward pass), and 512 positions of logits.
    """

    def __init__(
        self,
        runner: LayerRunner,
        activations: Mapping[SiteName, ActivationQuantizer],
        kv: Sequence[KVQuantizer],
        hadamard_groups: int,
        layer_tensors: LayerTensors | None = None,
        objective: Objective = "cross_entropy",
    ) -> None:
        """Read the model and fold it.

        Args:
            runner: of the model, in float32.
            activations: quantizer of each site's input; a site left out is not rounded. That of "down" must hold the
                online Hadamard that ``hadamard_groups`` stands for.
            kv: quantizer of each layer, with its U_C.
            hadamard_groups: blocks of H_D in down_proj's columns, 0 for none.
            layer_tensors: the float layers where they are not the model's own (channels in another order).
            objective: what :meth:`loss` returns.

        Raises:
            ResQError: ``kv`` of another number of layers, or a runner in less than float32.

        """
        adapter = runner.adapter
        if runner.dtype not in (torch.float32, torch.float64):
            raise ResQError(f"rotations are trained in float32, not {runner.dtype}; give a float32 runner")
        if len(kv) != adapter.num_layers:
            raise ResQError(f"KV quantizers of {len(kv)} layers for a model of {adapter.num_layers}; give one a layer")
        self._runner = runner
        self._objective = objective
        self._exact: dict[SiteName, Transform] = {site: q.transform for site, q in activations.items()}
        self._layers: list[LoadedLayer] = []
        for index, cache in enumerate(kv):
            folded = fold_norms((layer_tensors or runner.source.layer_tensors)(index), adapter, index)
            down = adapter.linear(index, "down") + ".weight"
            folded[down] = rotate_rows(folded[down].double(), hadamard_groups)
            layer = runner.layer(index, folded)
            for site, quantizer in activations.items():
                layer.transforms[site] = replace(quantizer, rounding=straight_through(quantizer.rounding))
            rounded = replace(cache, key=straight_through(cache.key), value=straight_through(cache.value))
            layer.attention_hook = rounded.hook()
            self._layers.append(layer)
        self._embedding = runner.source.embedding().to(runner.device, runner.dtype)
        self._head = self._embedding if adapter.tied else runner.source.lm_head().to(runner.device, runner.dtype)
        self._norm = adapter.norm_module()
        self._norm_weight = runner.source.final_norm().to(runner.device, runner.dtype)

    def loss(
        self, ids: torch.Tensor, lengths: torch.Tensor, residual: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Mean of the objective over all positions that predict a token, in nats, a scalar.

        ids [B, T], padded on the right, where padding changes nothing before it; lengths [B], real tokens; residual
        U_A [d, d], value U_B [L, kv, hd, hd].
        """
        device, dtype = self._runner.device, self._runner.dtype
        basis, heads = residual.to(device, dtype), value.to(device, dtype)
        ids = ids.to(device)
        hidden = F.embedding(ids, self._embedding) @ basis
        for index in range(len(self._layers)):
            # No dropout anywhere: the second pass needs no random state.
            hidden = checkpoint(
                self._layer, index, hidden, basis, heads[index], use_reentrant=False, preserve_rng_state=False
            )
        real = torch.arange(1, ids.shape[1], device=device) < lengths.to(device)[:, None]
        states = hidden[:, :-1][real].split(LOGIT_ROWS)
        if self._objective == "divergence":
            target, function = self._unrounded(ids)[:, :-1][real], self._divergence
        else:
            target, function = ids[:, 1:][real], self._cross_entropy
        total = torch.zeros((), device=device, dtype=dtype)
        for rows, wanted in zip(states, target.split(LOGIT_ROWS), strict=True):
            total = total + checkpoint(function, rows, wanted, basis, use_reentrant=False, preserve_rng_state=False)
        return total / len(target)

    def _layer(self, index: int, hidden: torch.Tensor, basis: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        layer = self._layers[index]
        # The key rotation acts in the attention hook.
        rotation = LayerRotation(basis, heads, key=heads[0])
        return layer.differentiable(hidden, rotate_layer(layer.tensors(), self._runner.adapter, index, rotation))

    @torch.no_grad()
    def _unrounded(self, ids: torch.Tensor) -> torch.Tensor:
        """Last layer's output [B, T, d] of the float model, in the model's own basis: no U acts, H_D does."""
        hidden = F.embedding(ids, self._embedding)
        for layer in self._layers:
            rounding, hook = layer.transforms, layer.attention_hook
            layer.transforms, layer.attention_hook = self._exact, None
            hidden = layer.forward(hidden)
            layer.transforms, layer.attention_hook = rounding, hook
        return hidden

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        # In the model's own basis its own final norm and lm_head serve: no fused table of the whole vocabulary.
        return F.linear(functional_call(self._norm, {"weight": self._norm_weight}, (states,)), self._head)

    def _cross_entropy(self, states: torch.Tensor, target: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self._logits(states @ basis.mT), target, reduction="sum")

    def _divergence(self, states: torch.Tensor, target: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        rounded, exact = self._logits(states @ basis.mT).log_softmax(-1), self._logits(target).log_softmax(-1)
        return F.kl_div(rounded, exact, reduction="sum", log_target=True)
