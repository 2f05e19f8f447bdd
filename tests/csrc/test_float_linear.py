"""ops.linear_bf16: as exact as torch's product, row by row the same, for every width and number of outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops, reference
from tests.csrc.support import ISAS, assert_no_worse, generator, running


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed)).bfloat16()


def _exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 11),
    outputs=st.integers(1, 300),
    columns=st.integers(1, 200),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(isa: str, rows: int, outputs: int, columns: int, with_bias: bool, seed: int) -> None:
    x, weight = _random(seed, rows, columns), _random(seed + 1, outputs, columns)
    bias = _random(seed + 2, outputs) if with_bias else None
    with running(isa):
        y = ops.linear_bf16(x, weight, bias)
        alone = [ops.linear_bf16(row, weight, bias) for row in x]
    assert torch.equal(torch.stack(alone), y)
    assert_no_worse(y, reference.linear_bf16(x, weight, bias), _exact(x, weight, bias))


@pytest.mark.parametrize("isa", ISAS)
def test_many_shares(isa: str) -> None:
    x, weight = _random(0, 2, 2048), _random(1, 1003, 2048)
    with running(isa):
        y = ops.linear_bf16(x, weight)
    assert_no_worse(y, torch.nn.functional.linear(x, weight), _exact(x, weight, None))


@pytest.mark.parametrize("isa", ISAS)
def test_special_numbers(isa: str) -> None:
    x = torch.tensor([[1.0, 2.0, -3.0]]).bfloat16()
    weight = torch.tensor([[1e38, 1e38, 0.0], [float("nan"), 0, 0], [0, float("inf"), 0], [1e-40, 0, 0]]).bfloat16()
    with running(isa):
        y = ops.linear_bf16(x, weight)
    assert torch.equal(y.isnan(), torch.tensor([[False, True, False, False]]))
    assert float(y[0, 2]) == float("inf")
    assert y[0, 3] == weight[3, 0]
    torch.testing.assert_close(y[0, 0], torch.tensor(3e38).bfloat16())


def test_rows_apart_leading_dimensions_and_no_rows() -> None:
    weight, x = _random(0, 70, 64), _random(1, 6, 128)
    assert torch.equal(ops.linear_bf16(x[::2, :64], weight), ops.linear_bf16(x[::2, :64].contiguous(), weight))
    assert torch.equal(
        ops.linear_bf16(x.view(2, 3, 128)[..., :64], weight).flatten(0, 1), ops.linear_bf16(x[:, :64], weight)
    )
    assert ops.linear_bf16(x[:0, :64], weight).shape == (0, 70)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        (torch.zeros(1, 8), torch.zeros(4, 8).bfloat16(), None, "x must be bfloat16"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4, 8), None, "weight must be bfloat16"),
        (torch.zeros(1, 7).bfloat16(), torch.zeros(4, 8).bfloat16(), None, "x must have shape"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(8, 4).bfloat16().t(), None, "weight must be contiguous"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(8).bfloat16(), None, "weight must have shape"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.zeros(5).bfloat16(), "bias must have shape"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.zeros(4), "bias must be bfloat16"),
    ],
)
def test_bad_arguments(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        ops.linear_bf16(x, weight, bias)


def test_compiled_graphs_know_the_shape() -> None:
    fake = torch.ops.resq.linear_bf16(torch.empty(3, 8, device="meta"), torch.empty(5, 8, device="meta"), None)
    assert fake.shape == (3, 5)
