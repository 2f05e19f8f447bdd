"""The op that runs a stack of decoder layers: one call where the layers share a batch, vLLM's attention where not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import decoder, vllm_api
from resq_vllm.attention import ResQMetadata, packed_backend
from tests.csrc.decoder_stack import HEAD_DIM, HEADS, KV_HEADS, SCALE, Stack
from tests.csrc.support import assert_identical

Result = tuple[torch.Tensor, torch.Tensor]


def attention_layers(stack: Stack, caches: list[torch.Tensor]) -> dict[str, Any]:
    """The stack's attention as vLLM holds it: layers by name, with impl, rotation and cache."""
    layers = {}
    for i, layout in enumerate(stack.layouts):
        window = None if stack.windows[i] < 0 else stack.windows[i]
        impl = packed_backend(layout).get_impl_cls()(HEADS, HEAD_DIM, SCALE, KV_HEADS, None, window)
        layer = SimpleNamespace(impl=impl, key_rotation=stack.rotations[i], kv_cache=caches[i])
        layers[f"model.layers.{i}.self_attn.attn"] = layer
    return layers


def metadata(stack: Stack) -> ResQMetadata:
    slots, table, lens, starts = stack.batch
    return ResQMetadata(stack.starts[-1], starts, lens, table, slots)


class Calls:
    """Which way the op went, and what vLLM would know of the batch."""

    def __init__(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.caches = stack.caches()
        self.layers = attention_layers(stack, self.caches)
        shared = metadata(stack)
        self.batches: dict[str, Any] = dict.fromkeys(self.layers, shared)
        self.alone: list[str] = []
        self.connected = False
        self.stack = stack
        monkeypatch.setattr(vllm_api, "get_attention_context", self.context)
        monkeypatch.setattr(vllm_api, "unified_attention_with_output", self.attend)
        monkeypatch.setattr(vllm_api, "has_kv_transfer_group", lambda: self.connected)

    def context(self, name: str) -> tuple[Any, Any, torch.Tensor, None]:
        return self.batches[name], self.layers[name], self.layers[name].kv_cache, None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, name: str) -> None:
        self.alone.append(name)
        batch, layer, cache, _ = self.context(name)
        layer.impl.forward(layer, q, k, v, cache, batch, out)

    def run(self) -> Result:
        given = self.stack.arguments(self.caches)
        names = list(self.layers)
        ids = []
        for at in range(0, len(names), 8):
            part = names[at : at + 8]
            ids.append(decoder.layer_ids(*part, *part[-1:] * (8 - len(part))))
        inputs = [given[name] for name in ("qkv", "residual", "positions", "cos_sin_cache")]
        return torch.ops.resq.decoder.default(*inputs, ids, given["weights"], given["epsilons"], HEADS, KV_HEADS)


@pytest.fixture
def stack() -> Stack:
    return Stack(torch.bfloat16, [0, 1, 20], [40, 19], [-1, 9, -1])


@pytest.fixture
def calls(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(stack, monkeypatch)


def test_layers_that_share_a_batch_are_one_call(stack: Stack, calls: Calls) -> None:
    caches = stack.caches()
    assert_identical(calls.run(), stack.separately(caches), "stack")
    assert_identical(calls.caches, caches, "caches")
    assert calls.alone == []


def test_more_layers_than_one_op_names(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(torch.bfloat16, [0, 1], [3], [-1] * 11)
    calls = Calls(stack, monkeypatch)
    assert_identical(calls.run(), stack.separately(stack.caches()), "stack")
    assert calls.alone == []


def another_batch(calls: Calls) -> None:
    name = list(calls.layers)[1]
    calls.batches[name] = replace(calls.batches[name])


def a_connector(calls: Calls) -> None:
    calls.connected = True


def another_backend(calls: Calls) -> None:
    ours = list(calls.layers.values())[2].impl
    list(calls.layers.values())[2].impl = SimpleNamespace(forward=ours.forward)


@pytest.mark.parametrize("change", [another_batch, a_connector, another_backend])
def test_layers_that_differ_are_called_one_by_one(stack: Stack, calls: Calls, change: Any) -> None:
    change(calls)
    caches = stack.caches()
    assert_identical(calls.run(), stack.separately(caches), "layers")
    assert_identical(calls.caches, caches, "caches")
    assert calls.alone == list(calls.layers)


def test_profiling_without_a_batch_attends_to_nothing(calls: Calls) -> None:
    calls.batches = dict.fromkeys(calls.layers)
    y, residual = calls.run()
    assert calls.alone == list(calls.layers)
    assert torch.isfinite(y).all()
    assert torch.isfinite(residual).all()
    assert not any(cache.any() for cache in calls.caches)


def test_shapes_for_the_compiler_are_those_of_the_results(stack: Stack, calls: Calls) -> None:
    given = stack.arguments(calls.caches)
    expected = calls.run()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [given[name] for name in ("qkv", "residual", "positions", "cos_sin_cache")]
        ids = [torch.empty(8, dtype=torch.int64)]
        found = torch.ops.resq.decoder.default(*inputs, ids, given["weights"], given["epsilons"], HEADS, KV_HEADS)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


def test_a_name_keeps_its_number() -> None:
    first = decoder.layer_ids(*(f"a.{i}" for i in range(8)))
    assert first.dtype == torch.int64
    assert len(set(first.tolist())) == 8
    assert decoder.layer_ids(*(f"a.{i}" for i in range(8))).tolist() == first.tolist()
    assert decoder.layer_ids(*["a.3"] * 8).tolist() == [first[3]] * 8


def test_a_stack_is_kept_by_its_first_layer_until_a_tensor_is_another(stack: Stack, calls: Calls) -> None:
    layers = list(calls.layers.values())
    expected = calls.run()
    kept = layers[0].impl.stack
    assert kept is not None
    assert_identical(calls.run(), expected, "again")
    assert layers[0].impl.stack is kept
    assert all(layer.impl.stack is None for layer in layers[1:])
    old = layers[1].kv_cache.clone()
    layers[1].kv_cache = torch.zeros_like(old)
    calls.run()
    assert layers[0].impl.stack is not kept
    assert layers[1].kv_cache.any()
    assert_identical(calls.caches[1], old, "the cache before")
