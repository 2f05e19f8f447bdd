"""The pass that makes one op of decoder layers and their attention: vLLM's own graph, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.utils.torch_utils import _encode_layer_name

from tests.csrc.decoder_stack import EPSILON, HEAD_DIM, HEADS, KV_HEADS, Stack
from tests.csrc.support import assert_identical
from tests.resq_vllm.test_decoder import attention_layers, metadata
from tests.resq_vllm.test_fusion_cpu import add_norm, compiled, norm, silu_mul

STARTS, LENS = [0, 1, 20], [40, 19]
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@pytest.fixture
def stack() -> Stack:
    return Stack(torch.bfloat16, STARTS, LENS, [-1, -1, -1])


@pytest.fixture
def caches(stack: Stack) -> Iterator[list[torch.Tensor]]:
    """With vLLM's forward context around them, as its runner sets it."""
    found = stack.caches()
    layers = attention_layers(stack, found)
    context = ForwardContext(
        no_compile_layers=layers, attn_metadata=dict.fromkeys(layers, metadata(stack)), slot_mapping={}
    )
    with override_forward_context(context):
        yield found


def linear(x: torch.Tensor, layer: Any) -> torch.Tensor:
    return torch.ops.resq.linear_planned.default(x, *layer)


def model(
    stack: Stack,
    *,
    rope: Callable[..., Any] = RotaryEmbedding.forward_static,
    change: Change = lambda q, k, v: (q, k, v),
    between: Callable[[torch.Tensor], torch.Tensor] = lambda y: y,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The layers as vLLM writes them, from a first norm and qkv to the last MLP."""
    first = stack.layers[-1][-1]
    names = [_encode_layer_name(f"model.layers.{i}.self_attn.attn") for i in range(len(stack.layers))]

    def attend(qkv: torch.Tensor, positions: torch.Tensor, name: Any) -> torch.Tensor:
        q, k, v = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        q, k, v = change(q, k, v)
        q, k = rope(positions, q, k, HEAD_DIM, HEAD_DIM, stack.cache, True)
        out = torch.empty(qkv.shape[0], HEADS * HEAD_DIM, dtype=qkv.dtype)
        q, k, v = (t.view(-1, heads, HEAD_DIM) for t, heads in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS)))
        torch.ops.vllm.unified_attention_with_output(q, k, v, out.view(-1, HEADS, HEAD_DIM), name)
        return out.view(-1, HEADS * HEAD_DIM)

    def forward(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        residual, y = x, linear(norm(x, stack.layers[0][1], EPSILON), first)
        for i, (o, weight, _, up, down, next_weight, _, qkv) in enumerate(stack.layers):
            y, residual = add_norm(linear(attend(y, positions, names[i]), o), residual, weight, EPSILON)
            y = between(linear(silu_mul(linear(y, up)), down))
            if i + 1 < len(stack.layers):
                y, residual = add_norm(y, residual, next_weight, EPSILON)
                y = linear(y, qkv)
        return y + residual

    return forward


def inputs(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    return stack.residual, stack.positions


def test_a_model_is_one_op(stack: Stack, caches: list[torch.Tensor]) -> None:
    x, positions = inputs(stack)
    names, y = compiled(model(stack), x, positions)
    assert names == ["norm_linear", "layer_ids", "decoder"]
    # What the op was given is the test's own stack: the same integers, the same caches.
    stack.qkv = torch.ops.resq.norm_linear.default(x, None, stack.layers[0][1], EPSILON, *stack.layers[-1][-1])[0]
    apart = stack.caches()
    out, residual = stack.separately(apart)
    assert_identical(caches, apart, "caches")
    assert_identical(y, out + residual, "result")


def test_a_number_of_tokens_that_is_not_fixed_is_one_op_too(stack: Stack, caches: list[torch.Tensor]) -> None:
    function, (x, positions) = model(stack), inputs(stack)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(positions, 0)
    names, _ = compiled(function, x, positions)
    assert names == ["norm_linear", "layer_ids", "decoder"]


def left_alone(names: list[str], attentions: int) -> None:
    assert names.count("attention") == attentions
    assert names.count("decoder") == 0


def test_a_norm_of_q_and_k_stays(stack: Stack, caches: list[torch.Tensor]) -> None:
    def change(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = torch.ones(HEAD_DIM, dtype=q.dtype)
        return (*(norm(t.unflatten(-1, (-1, HEAD_DIM)), weight, EPSILON).flatten(-2) for t in (q, k)), v)

    left_alone(compiled(model(stack, change=change), *inputs(stack))[0], 3)


def test_neighbours_that_turn_together_stay(stack: Stack, caches: list[torch.Tensor]) -> None:
    def rope(*arguments: Any) -> Any:
        return RotaryEmbedding.forward_static(*arguments[:-1], False)

    left_alone(compiled(model(stack, rope=rope), *inputs(stack))[0], 3)


def test_a_part_of_the_head_that_turns_stays(stack: Stack, caches: list[torch.Tensor]) -> None:
    half = torch.cat([stack.cache[:, : HEAD_DIM // 4], stack.cache[:, HEAD_DIM // 2 : 3 * HEAD_DIM // 4]], dim=1)

    def rope(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        return RotaryEmbedding.forward_static(positions, q, k, HEAD_DIM, HEAD_DIM // 2, half, True)

    left_alone(compiled(model(stack, rope=rope), *inputs(stack))[0], 3)


def test_k_at_other_positions_than_q_stays(stack: Stack, caches: list[torch.Tensor]) -> None:
    def rope(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        turned = RotaryEmbedding.forward_static(positions, q, None, *rest)[0]
        return turned, RotaryEmbedding.forward_static(positions.flip(0), k, None, *rest)[0]

    left_alone(compiled(model(stack, rope=rope), *inputs(stack))[0], 3)


def test_sines_with_another_sign_stay(stack: Stack, caches: list[torch.Tensor]) -> None:
    def rope(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        cos, sin = stack.cache[positions].chunk(2, dim=-1)

        def turn(x: torch.Tensor) -> torch.Tensor:
            a, b = x.view(x.shape[0], -1, HEAD_DIM).chunk(2, dim=-1)
            c, s = cos[:, None], sin[:, None]
            return torch.cat((a * c - b * s, b * s + a * c), dim=-1).flatten(1)

        return turn(q), turn(k)

    left_alone(compiled(model(stack, rope=rope), *inputs(stack))[0], 3)


def test_an_all_reduce_in_every_layer_leaves_the_attentions(stack: Stack, caches: list[torch.Tensor]) -> None:
    names, _ = compiled(model(stack, between=lambda y: 2 * y), *inputs(stack))
    # Each layer up to its MLP can still run with its attention.
    assert names.count("decoder") == 3
    assert names.count("attention") == 0


def test_q_that_something_else_reads_stays(stack: Stack, caches: list[torch.Tensor]) -> None:
    first = stack.layers[-1][-1]

    def function(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        qkv = linear(norm(x, stack.layers[0][1], EPSILON), first)
        q, k, v = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        q, k = RotaryEmbedding.forward_static(positions, q, k, HEAD_DIM, HEAD_DIM, stack.cache, True)
        out = torch.empty(x.shape[0], HEADS * HEAD_DIM, dtype=x.dtype)
        q, k, v = (t.view(-1, heads, HEAD_DIM) for t, heads in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS)))
        name = _encode_layer_name("model.layers.0.self_attn.attn")
        torch.ops.vllm.unified_attention_with_output(q, k, v, out.view(-1, HEADS, HEAD_DIM), name)
        o, weight, _, up, down, *_ = stack.layers[0]
        y, residual = add_norm(linear(out, o), x, weight, EPSILON)
        return linear(silu_mul(linear(y, up)), down) + residual + qkv.sum(-1, keepdim=True)

    names, _ = compiled(function, *inputs(stack))
    left_alone(names, 1)
