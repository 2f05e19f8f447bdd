"""Moments of a whole model equal those that hooks on transformers' model give; interrupted runs can be taken up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offline.calibrate.collect import collect_moments, moments_fingerprint
from offline.calibrate.moments import ModelMoments
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import random_sequences, save_tiny

SEQUENCES = random_sequences([20, 20, 11, 30])


def direct_moments(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Second moments from forward hooks: norm outputs divided by γ, v_proj outputs, cached keys."""
    residual: list[torch.Tensor] = []
    values: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    keys: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for index, block in enumerate(model.model.layers):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.register_forward_hook(lambda m, _, out: residual.append(out[0] / m.weight))
        block.self_attn.v_proj.register_forward_hook(lambda _, args, out, i=index: values[i].append(out[0]))
    for sequence in SEQUENCES:
        with torch.no_grad():
            cache = model(sequence, use_cache=True).past_key_values
        for index in range(len(keys)):
            keys[index].append(cache.layers[index].keys[0].flatten(0, 1))

    def product(rows: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(rows).double()
        return x.T @ x

    by_head = [torch.cat(v).view(-1, 2, 16).transpose(0, 1).double() for v in values]
    return product(residual), [v.mT @ v for v in by_head], [product(k) for k in keys]


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_moments_equal_a_direct_computation(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    steps: list[tuple[int, int]] = []
    moments = collect_moments(
        LayerRunner(ModelSource.open(tmp_path)), SEQUENCES, progress=lambda i, n: steps.append((i, n))
    )
    residual, values, keys = direct_moments(model)
    torch.testing.assert_close(moments.residual.sum, residual, rtol=1e-4, atol=1e-3)
    for index in range(3):
        torch.testing.assert_close(moments.value[index].sum, values[index], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments.key[index].sum, keys[index], rtol=1e-3, atol=1e-3)
    assert moments.residual.tokens == 81 * 2 * 3
    assert [m.tokens for m in moments.value] == [81] * 3
    assert [m.tokens for m in moments.key] == [81 * 2] * 3
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    runner = LayerRunner(ModelSource.open(tmp_path))
    path = tmp_path / "moments.safetensors"

    class Interrupted(Exception):  # noqa: N818 (not an error)
        pass

    def store(moments: ModelMoments) -> None:
        moments.save(path)
        if moments.layers_done == 2:
            raise Interrupted

    whole = collect_moments(runner, SEQUENCES)
    with pytest.raises(Interrupted):
        collect_moments(runner, SEQUENCES, store=store)
    saved = ModelMoments.load(path, moments_fingerprint(runner, SEQUENCES))
    assert saved.layers_done == 2
    stored: list[int] = []
    resumed = collect_moments(runner, SEQUENCES, resume=saved, store=lambda m: stored.append(m.layers_done))
    assert stored == [3]
    assert torch.equal(resumed.residual.sum, whole.residual.sum)
    assert resumed.residual.tokens == whole.residual.tokens
    for a, b in zip([*resumed.value, *resumed.key], [*whole.value, *whole.key], strict=True):
        assert torch.equal(a.sum, b.sum)
        assert a.tokens == b.tokens
    again = collect_moments(runner, SEQUENCES, resume=resumed)
    assert torch.equal(again.residual.sum, whole.residual.sum)


def test_moments_of_other_text_are_not_taken_up(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    runner = LayerRunner(ModelSource.open(tmp_path))
    moments = collect_moments(runner, SEQUENCES)
    with pytest.raises(ResQError, match="other calibration text"):
        collect_moments(runner, SEQUENCES[:-1], resume=moments)
    moments.save(tmp_path / "m.safetensors")
    with pytest.raises(ResQError, match="other calibration text"):
        ModelMoments.load(tmp_path / "m.safetensors", moments_fingerprint(runner, SEQUENCES[:-1]))


def test_fewer_tokens_than_the_hidden_size(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ResQError, match="40 calibration tokens are fewer than the hidden size 48"):
        collect_moments(LayerRunner(ModelSource.open(tmp_path)), SEQUENCES[:2])


def test_activations_that_overflow(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(ResQError, match="layer 1: the activations overflow"):
        collect_moments(LayerRunner(ModelSource.open(tmp_path)), SEQUENCES)
