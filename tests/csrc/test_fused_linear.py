"""Linear layers with the norm or the activation before them: equal to the separate steps."""

from __future__ import annotations

import pytest
import torch

from resq_vllm import fused_linear, reference
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from tests.csrc.support import ISAS, Weights, assert_identical, generator, running

HIDDEN, INTERMEDIATE = 200, 448  # no multiples of a vector, 7 blocks of 64
EPSILON = 1e-5
ROWS = [0, 1, 3, 17, 90]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer_of(w: Weights, bias: torch.Tensor | None = None) -> fused_linear.Layer:
    return w.packed, w.scales, w.sums, bias, w.words, w.arguments[-1]


@pytest.fixture(scope="module")
def split() -> Weights:
    return Weights(linear_plan(LinearSite(low=176, high=24), HIDDEN, 64), 2 * INTERMEDIATE, 4, 1)


@pytest.fixture(scope="module", params=[7, 1])
def down(request: pytest.FixtureRequest) -> Weights:
    site = LinearSite(low=INTERMEDIATE, high=0, scales="block", hadamard_groups=request.param)
    return Weights(linear_plan(site, INTERMEDIATE, 64), HIDDEN, 4, 2)


@pytest.fixture(scope="module")
def o() -> Weights:
    return Weights(linear_plan(LinearSite(low=176, high=24), HIDDEN, 64), HIDDEN, 4, 3)


def rows_of(m: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (2 * torch.randn(m, columns, generator=generator(seed))).to(dtype)


def assert_near(ours: torch.Tensor, separate: torch.Tensor, limit: float) -> None:
    """A value on the edge of two codes may fall to the other one where exp differs in its last bit."""
    assert ours.shape == separate.shape
    assert ours.dtype == separate.dtype
    error = (ours.double() - separate.double()).norm()
    assert float(error) <= limit * float(separate.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
def test_norm_and_residual_equal_the_separate_steps(split: Weights, m: int, dtype: torch.dtype) -> None:
    x, residual = rows_of(m, HIDDEN, dtype, 4), rows_of(m, HIDDEN, dtype, 5)
    weight = torch.rand(HIDDEN, generator=generator(6)).to(dtype)
    bias = torch.randn(2 * INTERMEDIATE, generator=generator(7)).to(dtype)
    for isa in ISAS:
        with running(isa):
            for added in (residual, None):
                normed, total = reference.add_rms_norm(x, added, weight, EPSILON)
                expected = split.apply_planned(normed, bias), x.new_empty(0) if added is None else total
                assert_identical(
                    fused_linear.norm_linear(x, added, weight, EPSILON, layer_of(split, bias)), expected, isa
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
def test_silu_equals_the_separate_steps(down: Weights, m: int, dtype: torch.dtype) -> None:
    x = rows_of(m, 2 * INTERMEDIATE, dtype, 8)
    separate = reference.silu_mul(x)
    for isa in ISAS:
        with running(isa):
            assert_near(fused_linear.silu_linear(x, layer_of(down)), down.apply_planned(separate), 0.02)


def test_silu_of_large_values(down: Weights) -> None:
    x = torch.ones(2, 2 * INTERMEDIATE)
    x[:, :INTERMEDIATE:2] = 300.0
    x[:, 1:INTERMEDIATE:2] = -300.0
    for isa in ISAS:
        with running(isa):
            assert_near(fused_linear.silu_linear(x, layer_of(down)), down.apply_planned(reference.silu_mul(x)), 1e-5)


# More than 768 rows are worked on in parts.
@pytest.mark.parametrize("m", [*ROWS, 768, 1700])
def test_decoder_mlp_is_its_three_layers(o: Weights, split: Weights, down: Weights, m: int) -> None:
    x, residual = rows_of(m, HIDDEN, torch.bfloat16, 9), rows_of(m, HIDDEN, torch.bfloat16, 10)
    weight = torch.rand(HIDDEN, generator=generator(11)).bfloat16()
    for isa in ISAS:
        with running(isa):
            attended = o.apply_planned(x)
            gate_up, total = fused_linear.norm_linear(attended, residual, weight, EPSILON, layer_of(split))
            expected = fused_linear.silu_linear(gate_up, layer_of(down)), total
            layers = layer_of(o), weight, EPSILON, layer_of(split), layer_of(down)
            assert_identical(fused_linear.decoder_mlp(x, residual, *layers), expected, isa)
            following = fused_linear.norm_linear(*expected, weight, EPSILON, layer_of(o))
            both = fused_linear.between_attentions(x, residual, *layers, weight, EPSILON, layer_of(o))
            assert_identical(both, following, isa)


def test_a_row_does_not_depend_on_its_batch(o: Weights, split: Weights, down: Weights) -> None:
    x, residual = rows_of(40, HIDDEN, torch.bfloat16, 12), rows_of(40, HIDDEN, torch.bfloat16, 13)
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16)
    layers = layer_of(o), weight, EPSILON, layer_of(split), layer_of(down)
    for isa in ISAS:
        with running(isa):
            together = fused_linear.decoder_mlp(x, residual, *layers)
            for row in (0, 39):
                alone = fused_linear.decoder_mlp(x[row : row + 1], residual[row : row + 1], *layers)
                assert_identical(alone, tuple(t[row : row + 1] for t in together), isa)


def test_library_checks(o: Weights, split: Weights, down: Weights) -> None:
    x, weight = torch.randn(3, HIDDEN), torch.rand(HIDDEN)
    q, up, last = layer_of(o), layer_of(split), layer_of(down)
    ops = torch.ops.resq
    torch.library.opcheck(ops.norm_linear.default, (x, None, weight, EPSILON, *up))
    torch.library.opcheck(ops.norm_linear.default, (x, x.clone(), weight, EPSILON, *up))
    torch.library.opcheck(ops.silu_linear.default, (torch.randn(3, 2 * INTERMEDIATE), *last))
    layers = *q, weight, EPSILON, *up, *last
    torch.library.opcheck(ops.decoder_mlp.default, (x, x.clone(), *layers))
    torch.library.opcheck(ops.between_attentions.default, (x, x.clone(), *layers, weight, EPSILON, *q))


def test_wrong_arguments_are_named(split: Weights, down: Weights) -> None:
    x, weight, layer = torch.randn(3, HIDDEN), torch.rand(HIDDEN), layer_of(split)
    with pytest.raises(RuntimeError, match=r"the norm's weight must have shape \[200\]"):
        fused_linear.norm_linear(x, None, weight[:-1], EPSILON, layer)
    with pytest.raises(RuntimeError, match="the norm's weight must have x's dtype"):
        fused_linear.norm_linear(x, None, weight.half(), EPSILON, layer)
    with pytest.raises(RuntimeError, match=r"residual must have x's shape \[3, 200\]"):
        fused_linear.norm_linear(x, x[:2], weight, EPSILON, layer)
    with pytest.raises(RuntimeError, match="residual must be contiguous"):
        fused_linear.norm_linear(x, x.T.contiguous().T, weight, EPSILON, layer)
    with pytest.raises(RuntimeError, match=r"x must have shape \[..., 896\]"):
        fused_linear.silu_linear(x, layer_of(down))
