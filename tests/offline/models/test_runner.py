"""The layer-by-layer runner equals the whole model, and shows the inputs that the model really has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offline.models.adapter import SITE_LINEARS
from offline.models.layer import Observed, Observer
from offline.models.runner import LayerRunner, make_batches
from offline.models.source import ModelSource
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SITES, SiteName
from tests.offline.models.tiny import FAMILIES, random_sequences, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    runner = LayerRunner(ModelSource.open(tmp_path))
    batches = make_batches(random_sequences([17, 17, 9, 1]))
    assert [list(batch.shape) for batch in batches] == [[2, 17], [1, 9], [1, 1]]
    hiddens = runner.embed(batches)
    for index in range(3):
        runner.layer(index).run(hiddens)
    for ids, hidden in zip(batches, hiddens, strict=True):
        with torch.no_grad():
            expected = model(ids).logits
        torch.testing.assert_close(runner.logits(hidden), expected, rtol=1e-4, atol=1e-4)


def test_the_window_matters_to_these_models(tmp_path: Path) -> None:
    model = save_tiny("mistral-window", tmp_path)
    ids = random_sequences([17])[0]
    with torch.no_grad():
        windowed = model(ids).logits
        model.config.sliding_window = None
        assert (model(ids).logits - windowed).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_observers_see_what_forward_hooks_of_the_model_see(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[1]
    parts = {"qkv": "self_attn.k_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    for site, path in parts.items():
        block.get_submodule(path).register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0]}))
    block.self_attn.v_proj.register_forward_hook(lambda _, args, out: seen.update({"value": out}))
    ids = random_sequences([12, 12])
    with torch.no_grad():
        cache = model(torch.cat(ids), use_cache=True).past_key_values
    runner = LayerRunner(ModelSource.open(tmp_path))
    hiddens = runner.embed(make_batches(ids))
    runner.layer(0).run(hiddens)
    found: dict[Observed, torch.Tensor] = {}
    observers: dict[Observed, Observer] = {
        name: lambda x, name=name: found.update({name: x})  # type: ignore[misc]
        for name in (*SITES, "key", "value")
    }
    runner.layer(1).run(hiddens, observers)
    seen["value"] = seen["value"].view(2, 12, 2, 16).transpose(1, 2)
    window = cache.layers[1].keys.shape[2]  # a sliding cache keeps the last tokens alone
    seen["key"] = cache.layers[1].keys
    found["key"] = found["key"][:, :, -window:]
    for name, expected in seen.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("site", SITES)
def test_stream_inputs_gives_every_batch_once_and_stops_early(site: SiteName, tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    runner = LayerRunner(ModelSource.open(tmp_path))
    batches = make_batches(random_sequences([8, 8, 5]), max_tokens=8)
    hiddens = runner.embed(batches)
    layer = runner.layer(0)
    streamed: list[torch.Tensor] = []
    layer.stream_inputs(hiddens, site, streamed.append)
    observed: list[torch.Tensor] = []
    before = [hidden.clone() for hidden in hiddens]
    for hidden in hiddens:
        layer.forward(hidden, {site: lambda x: observed.append(x.flatten(0, 1))})
    assert [len(x) for x in streamed] == [8, 8, 5]
    for x, y, hidden, copy in zip(streamed, observed, hiddens, before, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(hidden, copy)
    layer.linear("down").weight.data.fill_(float("nan"))
    layer.stream_inputs(hiddens, site, streamed.append)
    assert all(bool(torch.isfinite(x).all()) for x in streamed)


@pytest.mark.parametrize("site", SITES)
def test_transforms_act_before_the_linears_and_are_observed(site: SiteName, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    runner = LayerRunner(ModelSource.open(tmp_path))
    hidden = runner.embed(random_sequences([6]))[0]
    halved, plain = runner.layer(0), runner.layer(0)
    calls: list[torch.Tensor] = []
    halved.transforms[site] = lambda x: calls.append(x) or x / 2  # type: ignore[func-returns-value]
    for name in SITE_LINEARS[site]:
        plain.set_weight(name, plain.weight(name) / 2)
    observed: list[torch.Tensor] = []
    output = halved.forward(hidden, {site: observed.append})
    torch.testing.assert_close(output, plain.forward(hidden))
    assert len(calls) == len(observed) == 1
    assert torch.equal(observed[0], calls[0] / 2)


def test_attention_hook_replaces_keys_and_values(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    runner = LayerRunner(ModelSource.open(tmp_path))
    hidden = runner.embed(random_sequences([6]))[0]
    layer = runner.layer(0)
    plain = layer.forward(hidden)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    layer.attention_hook = lambda q, k, v: (q @ rotation, k @ rotation, v)
    torch.testing.assert_close(layer.forward(hidden), plain, rtol=1e-4, atol=1e-4)
    layer.attention_hook = lambda q, k, v: (q, k, torch.zeros_like(v))
    zeroed = layer.forward(hidden)
    layer.attention_hook = None
    layer.set_weight("o", torch.zeros_like(layer.weight("o")))
    torch.testing.assert_close(zeroed, layer.forward(hidden))
    assert (zeroed - plain).abs().max() > 0.1


def test_set_weight_leaves_the_callers_tensors_alone(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source = ModelSource.open(tmp_path)
    tensors = source.layer_tensors(0)
    layer = LayerRunner(source).layer(0, tensors)
    layer.set_weight("q", torch.zeros(64, 48))
    assert not bool(layer.weight("q").any())
    assert bool(tensors["model.layers.0.self_attn.q_proj.weight"].any())


def test_set_weight_of_another_shape(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    layer = LayerRunner(ModelSource.open(tmp_path)).layer(2)
    with pytest.raises(ResQError, match=r"model\.layers\.2\.mlp\.down_proj.*\[96, 48\].*\[48, 96\]"):
        layer.set_weight("down", torch.zeros(96, 48))


def test_layer_with_a_tensor_too_few_or_too_many(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source = ModelSource.open(tmp_path)
    runner = LayerRunner(source)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = source.layer_tensors(0)
    up = tensors.pop(name)
    with pytest.raises(ResQError, match=f"{name} is missing"):
        runner.layer(0, tensors)
    with pytest.raises(ResQError, match=r"rope\.weight is not one of its tensors"):
        runner.layer(0, tensors | {name: up, "model.layers.0.rope.weight": up})


def test_token_outside_the_embedding(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ResQError, match="token id 64 is outside the embedding of 64 rows"):
        LayerRunner(ModelSource.open(tmp_path)).embed([torch.tensor([[1, 64]])])


def test_batches_hold_no_more_than_max_tokens() -> None:
    batches = make_batches(random_sequences([4] * 5 + [6, 4]), max_tokens=8)
    assert [tuple(batch.shape) for batch in batches] == [(2, 4), (2, 4), (1, 4), (1, 6), (1, 4)]
