"""Rotation and fusion change no logit: in float64 to rounding, in float32 through the layer runner."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offline.bases.bases import LayerRotation, Rotations
from offline.bases.rotation import haar_orthogonal, named_generator
from offline.models.attention import ATTENTION_NAME, set_attention_hook
from offline.models.registry import adapter_for
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.rotate.fuse import ROW_CHUNK, fold_norms, fuse_embedding, fuse_layer, fuse_lm_head, rotate_rows
from resq_vllm.errors import ResQError
from resq_vllm.hadamard import block_matrix
from tests.offline.models.tiny import FAMILIES, random_sequences, save_tiny, tiny_model

D, HD, KV, LAYERS, FFN = 48, 16, 2, 3, 96


def random_rotations(seed: int = 0) -> Rotations:
    """Any orthogonal matrices must do, so these have no structure at all."""

    def haar(n: int, *name: int | str) -> torch.Tensor:
        return haar_orthogonal(n, named_generator(seed, *name))

    value = [torch.stack([haar(HD, "v", i, t) for t in range(KV)]) for i in range(LAYERS)]
    key = [haar(HD, "k", i) for i in range(LAYERS)]
    return Rotations(haar(D, "r"), torch.stack(value), torch.stack(key), 6, 2)


def exact_norms(model: Any) -> Any:
    """The model in float64, with norms that do not fall back to float32 as transformers' do."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            norm = nn.RMSNorm(len(module.weight), eps=model.config.rms_norm_eps, dtype=torch.float64)
            norm.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
    return model


def rotated_model(model: Any, rotations: Rotations, groups: int) -> Any:
    """``model`` (float64) with fused weights, U_C and H_D at run time, norm weights one and embeddings untied."""
    model.config.architectures = [type(model).__name__]
    adapter = adapter_for(model.config)
    state = model.state_dict()
    fused: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        tensors = {name: state[name] for name in adapter.layer_shapes(layer)}
        fused |= fuse_layer(tensors, adapter, layer, rotations.layer(layer), groups, torch.float64)
    embedding, gamma = state[adapter.embedding], state[adapter.final_norm]
    head = state["lm_head.weight"]
    fused[adapter.embedding] = fuse_embedding(embedding, rotations.residual, torch.float64)
    fused["lm_head.weight"] = fuse_lm_head(head, gamma, rotations.residual, torch.float64)
    fused[adapter.final_norm] = torch.ones_like(gamma)
    result = deepcopy(model)
    result.lm_head.weight = nn.Parameter(fused["lm_head.weight"].clone())
    result.load_state_dict(fused)
    result.config._attn_implementation = ATTENTION_NAME
    for layer, block in enumerate(result.model.layers):
        u = rotations.key[layer]
        set_attention_hook(block.self_attn, lambda q, k, v, u=u: (q @ u, k @ u, v))  # type: ignore[misc]
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: (rotate_rows(args[0], groups),))
    return result


@pytest.mark.parametrize("groups", [8, 1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_unchanged_in_float64(family: str, groups: int) -> None:
    model = exact_norms(tiny_model(family))
    rotated = rotated_model(model, random_rotations(), groups)
    ids = torch.cat(random_sequences([24, 24]))
    with torch.no_grad():
        expected, found = model(ids).logits, rotated(ids).logits
    assert expected.dtype == found.dtype == torch.float64
    assert float(expected.abs().max()) > 1
    assert float((found - expected).abs().max()) < 1e-9
    difference = rotated.model.layers[0].self_attn.v_proj.weight - model.model.layers[0].self_attn.v_proj.weight
    assert float(difference.detach().abs().max()) > 0.1


def test_every_run_time_step_is_needed() -> None:
    """The hooks of the test above do act: without either, the logits differ."""
    model = exact_norms(tiny_model("qwen2"))
    ids = random_sequences([24])[0]
    for leave_out in ("U_C on keys", "H_D"):
        rotated = rotated_model(model, random_rotations(), 8)
        for layer, block in enumerate(rotated.model.layers):
            if leave_out == "H_D":
                block.mlp.down_proj._forward_pre_hooks.clear()
            else:
                u = random_rotations().key[layer]
                set_attention_hook(block.self_attn, lambda q, k, v, u=u: (q @ u, k, v))  # type: ignore[misc]
        with torch.no_grad():
            assert float((rotated(ids).logits - model(ids).logits).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_runner_runs_a_rotated_layer(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    source = ModelSource.open(tmp_path)
    runner, rotations = LayerRunner(source), random_rotations()
    ids = random_sequences([19])[0]
    hiddens = runner.embed([ids], fuse_embedding(source.embedding(), rotations.residual))
    for index in range(LAYERS):
        fused = fuse_layer(source.layer_tensors(index), source.adapter, index, rotations.layer(index), 8)
        layer = runner.layer(index, fused)
        layer.transforms["down"] = lambda x: rotate_rows(x, 8)
        layer.run(hiddens)
    head = fuse_lm_head(source.lm_head(), source.final_norm(), rotations.residual)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(runner.logits(hiddens[0], torch.ones(D), head), expected, rtol=1e-3, atol=1e-3)


def adapter_and_layer(family: str = "llama-bias") -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    adapter = adapter_for(model.config)
    state = model.state_dict()
    return adapter, {name: state[name] for name in adapter.layer_shapes(1)}


def test_norms_become_one_and_inputs_stay_as_they_were() -> None:
    adapter, tensors = adapter_and_layer()
    before = {name: value.clone() for name, value in tensors.items()}
    folded = fold_norms(tensors, adapter, 1)
    fused = fuse_layer(tensors, adapter, 1, random_rotations().layer(1), 8)
    for norm in ("input", "post"):
        for result in (folded, fused):
            assert torch.equal(result[adapter.norm(1, norm)], torch.ones(D))
    for name, value in tensors.items():
        assert torch.equal(value, before[name])
        assert fused[name].shape == value.shape
        assert fused[name].dtype == torch.float32
    gamma = tensors[adapter.norm(1, "post")].double()
    up = adapter.linear(1, "up") + ".weight"
    assert torch.equal(folded[up], tensors[up].double() @ torch.diag(gamma))
    down = adapter.linear(1, "down") + ".weight"
    assert torch.equal(folded[down], tensors[down])


def test_value_and_output_follow_the_formulas_head_by_head() -> None:
    adapter, tensors = adapter_and_layer()
    rotation = random_rotations().layer(1)
    fused = fuse_layer(tensors, adapter, 1, rotation, 8, torch.float64)
    folded = {n: t.double() for n, t in fold_norms(tensors, adapter, 1).items()}
    v, o, down = (adapter.linear(1, name) for name in ("v", "o", "down"))
    u = rotation.residual
    for t in range(KV):
        rows = slice(t * HD, (t + 1) * HD)
        expected = rotation.value[t].T @ folded[v + ".weight"][rows] @ u
        torch.testing.assert_close(fused[v + ".weight"][rows], expected)
        torch.testing.assert_close(fused[v + ".bias"][rows], folded[v + ".bias"][rows] @ rotation.value[t])
    for j in range(adapter.num_heads):
        columns = slice(j * HD, (j + 1) * HD)
        expected = u.T @ folded[o + ".weight"][:, columns] @ rotation.value[j // 2]
        torch.testing.assert_close(fused[o + ".weight"][:, columns], expected)
    h = torch.block_diag(*[block_matrix(FFN // 8)] * 8)
    torch.testing.assert_close(fused[down + ".weight"], u.T @ folded[down + ".weight"] @ h.T)
    for name in (o, down):
        torch.testing.assert_close(fused[name + ".bias"], folded[name + ".bias"] @ u)
    for name in ("q", "k", "gate", "up"):
        bias = adapter.linear(1, name) + ".bias"
        assert torch.equal(fused[bias], folded[bias])


@pytest.mark.parametrize(("width", "groups"), [(96, 8), (96, 1), (64, 2), (56, 2), (8, 8)])
def test_rotate_rows_is_the_block_matrix(width: int, groups: int) -> None:
    x = torch.randn(5, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = torch.block_diag(*[block_matrix(width // groups)] * groups)
    torch.testing.assert_close(rotate_rows(x, groups), x @ h.T)
    assert rotate_rows(x.float(), groups).dtype == torch.float32


def test_blocks_that_do_not_divide_or_have_no_order() -> None:
    with pytest.raises(ResQError, match="5 Hadamard blocks do not divide 96 columns"):
        rotate_rows(torch.zeros(1, 96), 5)
    with pytest.raises(ResQError, match="order 6"):
        rotate_rows(torch.zeros(1, 12), 2)


def test_embedding_longer_than_a_chunk() -> None:
    table = torch.randn(ROW_CHUNK + 3, 4, generator=torch.Generator().manual_seed(0))
    u = haar_orthogonal(4, named_generator(0))
    torch.testing.assert_close(fuse_embedding(table, u, torch.float64), table.double() @ u)
    assert fuse_embedding(table, u, torch.bfloat16).dtype == torch.bfloat16


def test_basis_of_another_model() -> None:
    adapter, tensors = adapter_and_layer()
    good = random_rotations().layer(0)
    for name, bad in (
        ("residual", LayerRotation(torch.eye(4, dtype=torch.float64), good.value, good.key)),
        ("value", LayerRotation(good.residual, good.value[:1], good.key)),
        ("key", LayerRotation(good.residual, good.value, good.key[:4, :4])),
    ):
        with pytest.raises(ResQError, match=f"the {name} basis has shape"):
            fuse_layer(tensors, adapter, 1, bad, 8)
    with pytest.raises(ResQError, match="fused in float64"):
        fuse_layer(tensors, adapter, 1, LayerRotation(good.residual.float(), good.value, good.key), 8)
    with pytest.raises(ResQError, match="does not fit an embedding of 5"):
        fuse_embedding(torch.zeros(3, 5), good.residual)
