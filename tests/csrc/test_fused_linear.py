"""Linear layers with the norm or the activation before them: equal to the separate steps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from resq_vllm import fused_linear, memory, reference
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


def test_mlp_so_wide_that_fewer_rows_are_worked_on_together() -> None:
    """Below 32 MiB there is room for 288 rows of gate_up's output."""
    hidden, columns, m = 128, 28672, 300
    up = Weights(linear_plan(LinearSite(low=112, high=16), hidden, 64), 2 * columns, 4, 14)
    last = Weights(linear_plan(LinearSite(low=columns - 64, high=64), columns, 64), hidden, 4, 15)
    o = Weights(linear_plan(LinearSite(low=112, high=16), hidden, 64), hidden, 4, 16)
    x, residual = rows_of(m, hidden, torch.bfloat16, 17), rows_of(m, hidden, torch.bfloat16, 18)
    weight = torch.rand(hidden, generator=generator(19)).bfloat16()
    gate_up, total = fused_linear.norm_linear(o.apply_planned(x), residual, weight, EPSILON, layer_of(up))
    expected = fused_linear.silu_linear(gate_up, layer_of(last)), total
    together = fused_linear.decoder_mlp(x, residual, layer_of(o), weight, EPSILON, layer_of(up), layer_of(last))
    assert_identical(together, expected, ISAS[-1])


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


KEPT = """
import os, torch
from pathlib import Path
from resq_vllm import fused_linear, memory
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from tests.csrc.support import Weights
def layer(n, k):
    w = Weights(linear_plan(LinearSite(low=k - 64, high=64), k, 64), n, 4, 1)
    return w.packed, w.scales, w.sums, None, w.words, w.arguments[-1]
def resident():
    memory.release_freed()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
memory.keep_freed_blocks()
layers = layer(128, 128), torch.ones(128).bfloat16(), 1e-5, layer(16384, 128), layer(128, 8192)
few, many = torch.ones(64, 128).bfloat16(), torch.ones(768, 128).bfloat16()
fused_linear.decoder_mlp(few, few, *layers)
before = resident()
fused_linear.decoder_mlp(many, many, *layers)
print(resident() - before)
"""


@pytest.mark.skipif(memory._glibc("mallopt") is None, reason="the C library is not glibc")
def test_output_of_gate_up_is_not_kept() -> None:
    """It is 24 MiB for 768 rows; codes of down's input, which threads keep, are a quarter of that."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 14 << 20


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
