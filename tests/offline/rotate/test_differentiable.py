"""The loss of the rounded model: its value against transformers' own, its gradient against formulas and differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from offline.bases.bases import LayerRotation, Rotations
from offline.bases.rotation import haar_orthogonal, named_generator
from offline.models.registry import adapter_for
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.quantize.activations import ActivationQuantizer, KVQuantizer, identity
from offline.rotate.differentiable import Objective, RotatedModel, straight_through
from offline.rotate.fuse import fold_norms, fuse_embedding, fuse_layer, fuse_lm_head, rotate_layer, rotate_rows
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import LinearSite, SiteName
from resq_vllm.formats.plan import linear_plan
from tests.offline.models.tiny import FAMILIES, random_sequences, save_tiny, tiny_model

D, HD, KV, LAYERS, FFN, GROUPS = 48, 16, 2, 3, 96, 8
OBJECTIVES: tuple[Objective, ...] = ("cross_entropy", "divergence")


def random_rotations(seed: int = 0) -> Rotations:
    def haar(n: int, *name: int | str) -> torch.Tensor:
        return haar_orthogonal(n, named_generator(seed, *name))

    value = [torch.stack([haar(HD, "v", i, t) for t in range(KV)]) for i in range(LAYERS)]
    return Rotations(haar(D, "r"), torch.stack(value), torch.stack([haar(HD, "k", i) for i in range(LAYERS)]), 6, 2)


def quantizers(rotations: Rotations) -> tuple[dict[SiteName, ActivationQuantizer], list[KVQuantizer]]:
    """ResQ's: 42 columns at 4 bits, 6 at 8; o_proj at 8; down with the Hadamard at 4; KV 14 + 2."""
    residual = LinearSite(low=D - 6, high=6)
    sites: dict[SiteName, LinearSite] = {
        "qkv": residual,
        "gate_up": residual,
        "o": LinearSite(low=4 * 14, high=4 * 2, act_low_bits=8, scales="token", order="heads"),
        "down": LinearSite(low=FFN, high=0, scales="block", hadamard_groups=GROUPS),
    }
    plans = {name: linear_plan(site, site.low + site.high, HD) for name, site in sites.items()}
    kv = [KVQuantizer.of_layout(KVLayout(HD, 2, 4), rotations.key[i]) for i in range(LAYERS)]
    return {name: ActivationQuantizer.of_plan(plan) for name, plan in plans.items()}, kv


def unrounded(rotations: Rotations) -> tuple[dict[SiteName, ActivationQuantizer], list[KVQuantizer]]:
    activations, kv = quantizers(rotations)
    return {"down": replace(activations["down"], rounding=identity)}, [KVQuantizer(cache.rotation) for cache in kv]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rounding_the_loss_is_the_models_own(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    ids = torch.cat(random_sequences([24, 24]))
    with torch.no_grad():
        logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    rotations = random_rotations()
    rotated = RotatedModel(LayerRunner(ModelSource.open(tmp_path)), *unrounded(rotations), GROUPS)
    found = rotated.loss(ids, torch.tensor([24, 24]), rotations.residual, rotations.value)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def fused_logits(
    runner: LayerRunner,
    rotations: Rotations,
    activations: Mapping[SiteName, ActivationQuantizer],
    kv: Sequence[KVQuantizer],
    ids: torch.Tensor,
) -> torch.Tensor:
    """[T, vocab] by the path that quantization itself takes: fuse_layer, LoadedLayer.forward, fused head."""
    source = runner.source
    hiddens = runner.embed([ids], fuse_embedding(source.embedding(), rotations.residual))
    for index in range(LAYERS):
        fused = fuse_layer(source.layer_tensors(index), source.adapter, index, rotations.layer(index), GROUPS)
        layer = runner.layer(index, fused)
        layer.transforms.update(activations)
        layer.attention_hook = kv[index].hook()
        layer.run(hiddens)
    head = fuse_lm_head(source.lm_head(), source.final_norm(), rotations.residual)
    return runner.logits(hiddens[0], torch.ones(D), head)[0]


def test_rounded_losses_are_those_of_the_fused_layers(tmp_path: Path) -> None:
    save_tiny("llama-bias", tmp_path)
    runner, rotations = LayerRunner(ModelSource.open(tmp_path)), random_rotations()
    ids = random_sequences([30])[0]
    rounded, exact = (fused_logits(runner, rotations, *q(rotations), ids)[:-1] for q in (quantizers, unrounded))
    with torch.no_grad():
        cross_entropy, divergence = (
            RotatedModel(runner, *quantizers(rotations), GROUPS, objective=objective)
            .loss(ids, torch.tensor([30]), rotations.residual, rotations.value)
            .item()
            for objective in OBJECTIVES
        )
    # A value that rounds the other way for a last-bit difference moves the loss a little.
    expected = F.cross_entropy(rounded, ids[0, 1:]).item()
    assert cross_entropy == pytest.approx(expected, abs=2e-3)
    assert abs(expected - F.cross_entropy(exact, ids[0, 1:]).item()) > 1e-2
    p, q = exact.double().softmax(-1), rounded.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert divergence == pytest.approx(expected, rel=1e-2)
    assert expected > 1e-2


def test_divergence_without_rounding_is_zero_and_the_rounding_comes_back(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    runner, rotations = LayerRunner(ModelSource.open(tmp_path)), random_rotations()
    ids, lengths = torch.cat(random_sequences([24, 24])), torch.tensor([24, 17])
    exact = RotatedModel(runner, *unrounded(rotations), GROUPS, objective="divergence")
    rounded = RotatedModel(runner, *quantizers(rotations), GROUPS, objective="divergence")
    with torch.no_grad():
        assert abs(exact.loss(ids, lengths, rotations.residual, rotations.value).item()) < 1e-5
        first, second = (rounded.loss(ids, lengths, rotations.residual, rotations.value).item() for _ in range(2))
    assert first == second
    assert first > 1e-2


def test_padding_changes_nothing(tmp_path: Path) -> None:
    save_tiny("qwen2-window", tmp_path)
    rotations = random_rotations()
    model = RotatedModel(LayerRunner(ModelSource.open(tmp_path)), *quantizers(rotations), GROUPS)
    long, short = random_sequences([21, 9])
    together = torch.zeros(2, 21, dtype=torch.long)
    together[0], together[1, :9] = long[0], short[0]
    with torch.no_grad():
        one, other = (
            model.loss(ids, torch.tensor([ids.numel()]), rotations.residual, rotations.value) for ids in (long, short)
        )
        found = model.loss(together, torch.tensor([21, 9]), rotations.residual, rotations.value)
        together[1, 9:] = 5
        again = model.loss(together, torch.tensor([21, 9]), rotations.residual, rotations.value)
    torch.testing.assert_close(found, (one * 20 + other * 8) / 28, rtol=0, atol=2e-3)
    assert torch.equal(found, again)


def layer_of(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    adapter = adapter_for(model.config)
    state = model.state_dict()
    return adapter, {name: state[name] for name in adapter.layer_shapes(1)}


def folded_layer(family: str, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    adapter, tensors = layer_of(family)
    folded = fold_norms(tensors, adapter, 1)
    down = adapter.linear(1, "down") + ".weight"
    folded[down] = rotate_rows(folded[down].double(), GROUPS)
    return adapter, {name: value.to(dtype) for name, value in folded.items()}


@pytest.mark.parametrize("family", ["llama-bias", "qwen2"])
def test_float32_fusion_equals_the_float64_one(family: str) -> None:
    adapter, tensors = layer_of(family)
    rotation = random_rotations().layer(1)
    expected = fuse_layer(tensors, adapter, 1, rotation, GROUPS, torch.float64)
    _, folded = folded_layer(family, torch.float32)
    single = LayerRotation(*(m.float() for m in (rotation.residual, rotation.value, rotation.key)))
    found = rotate_layer(folded, adapter, 1, single)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-bias", "qwen2"])
def test_gradient_of_the_fusion_against_differences(family: str) -> None:
    adapter, folded = folded_layer(family, torch.float64)
    rotation = random_rotations().layer(1)
    mix = {
        name: torch.randn(value.shape, generator=named_generator(1, name), dtype=torch.float64)
        for name, value in folded.items()
    }

    def mixed(residual: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        fused = rotate_layer(folded, adapter, 1, LayerRotation(residual, value, rotation.key))
        # Squares: the gradient must depend on where it is taken.
        return torch.stack([(fused[name] ** 2 * weight).sum() for name, weight in mix.items()]).sum()

    arguments = [m.clone().requires_grad_(True) for m in (rotation.residual, rotation.value)]
    torch.autograd.backward(mixed(*arguments))
    for position, argument in enumerate(arguments):
        gradient = argument.grad
        assert gradient is not None
        for seed in range(5):
            step = torch.randn(argument.shape, generator=named_generator(seed), dtype=torch.float64)
            ends = []
            for sign in (1, -1):
                moved = [a.detach() for a in arguments]
                moved[position] = moved[position] + sign * 1e-5 * step
                ends.append(mixed(*moved).item())
            assert (gradient * step).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_gradient_of_the_whole_loss_without_rounding_against_differences(tmp_path: Path) -> None:
    """Off the orthogonal matrices, where the loss does depend on U: layers, checkpoints, hook and head take part."""
    save_tiny("llama", tmp_path)
    runner, rotations = LayerRunner(ModelSource.open(tmp_path)), random_rotations()
    model = RotatedModel(runner, *unrounded(rotations), GROUPS)
    ids, lengths = torch.cat(random_sequences([16, 16])), torch.tensor([16, 11])
    arguments = [m.clone().requires_grad_(True) for m in (rotations.residual, rotations.value)]
    torch.autograd.backward(model.loss(ids, lengths, *arguments))
    for position, argument in enumerate(arguments):
        gradient = argument.grad
        assert gradient is not None
        # Along the gradient itself the difference stands highest above float32 noise.
        step, ends = gradient / gradient.norm(), []
        for sign in (1, -1):
            moved = [a.detach() for a in arguments]
            moved[position] = moved[position] + sign * 1e-3 * step
            with torch.no_grad():
                ends.append(model.loss(ids, lengths, *moved).item())
        assert gradient.norm().item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)
        assert gradient.norm().item() > 1e-2


def test_gradient_of_a_rounding_is_that_of_its_scale() -> None:
    """x̂ = s·(q − z): 1 for x itself, and (q − z) − x/s for s = (max − min)/15, which the extremes alone carry."""
    plan = linear_plan(LinearSite(low=8, high=0), 8, 8)
    x = torch.tensor([[0.3, -1.0, 2.0, 0.11, 0.77, -0.52, 1.2, 0.9]], requires_grad=True)
    rounding = ActivationQuantizer.of_plan(plan).rounding
    y = straight_through(rounding)(x)
    with torch.no_grad():
        torch.testing.assert_close(y, rounding(x), rtol=0, atol=0)
    mix = torch.arange(1.0, 9.0)
    torch.autograd.backward((y * mix).sum())
    s = 3.0 / 15
    residual = (torch.round(x.detach() / s) * s - x.detach()) / s  # (q − z) − x/s, in [-½, ½]
    expected = mix.clone()[None]
    slope = float((residual * mix).sum()) / 15
    expected[0, 2] += slope
    expected[0, 1] -= slope
    assert abs(slope) > 1e-2
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("high", [0, 2])
def test_kv_rounding_passes_gradients_and_keeps_its_values(high: int) -> None:
    cache = KVQuantizer.of_layout(KVLayout(HD, high, 4), None)
    x = torch.randn(3, 5, HD, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    y = straight_through(cache.key)(x)
    assert torch.equal(y.detach(), cache.key(x.detach()))
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    # Every value counts once; the extremes also move the scale, by at most half a step a value over 15 steps.
    assert float((x.grad - 1).abs().max()) < HD / 2 / 15
    assert float(x.grad.sum()) == pytest.approx(x.numel(), rel=0.05)


def test_rounding_that_autograd_cannot_follow_has_the_identitys_gradient() -> None:
    def coarse(x: torch.Tensor) -> torch.Tensor:
        return x.detach().mul(2).to(torch.int32).float() / 2

    x = torch.tensor([0.3, 0.8, -1.4], requires_grad=True)
    y = straight_through(coarse)(x)
    assert torch.equal(y.detach(), torch.tensor([0.0, 0.5, -1.0]))
    torch.autograd.backward((y * torch.tensor([1.0, 2.0, 3.0])).sum())
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert straight_through(identity) is identity


def test_gradients_do_not_depend_on_the_logit_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    rotations = random_rotations()
    model = RotatedModel(LayerRunner(ModelSource.open(tmp_path)), *quantizers(rotations), GROUPS)
    ids, results = random_sequences([40])[0], []
    for rows in (512, 7):
        monkeypatch.setattr("offline.rotate.differentiable.LOGIT_ROWS", rows)
        residual = rotations.residual.clone().requires_grad_(True)
        loss = model.loss(ids, torch.tensor([40]), residual, rotations.value)
        torch.autograd.backward(loss)
        assert residual.grad is not None
        results.append((loss.detach(), residual.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert math.isfinite(float(results[0][1].norm()))
    assert float(results[0][1].norm()) > 0


def test_wrong_runner_and_wrong_number_of_layers(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source, (activations, kv) = ModelSource.open(tmp_path), quantizers(random_rotations())
    with pytest.raises(ResQError, match=r"trained in float32, not torch\.bfloat16"):
        RotatedModel(LayerRunner(source, torch.bfloat16), activations, kv, GROUPS)
    with pytest.raises(ResQError, match="KV quantizers of 2 layers for a model of 3"):
        RotatedModel(LayerRunner(source), activations, kv[:2], GROUPS)
