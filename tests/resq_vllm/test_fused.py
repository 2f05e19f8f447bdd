"""Quantize ops of the GPU's GEMMs on the CPU: their specification, shapes for torch.compile, and bad arguments."""

from __future__ import annotations

import pytest
import torch

from resq_vllm import fused, reference
from resq_vllm.formats.activations import ActivationLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.hadamard import hadamard_matrix

SPLIT = linear_plan(LinearSite(low=224, high=32), 256, 64)
HEADS = linear_plan(LinearSite(low=224, high=32, scales="head", order="heads"), 256, 64)
DOWN = linear_plan(LinearSite(low=768, high=0, scales="block", hadamard_groups=8), 768, 64)


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _dense(plan: LinearPlan) -> torch.Tensor | None:
    return hadamard_matrix(plan.hadamard_k).float() if plan.hadamard_k > 1 else None


@pytest.mark.parametrize("nibbles", [False, True])
@pytest.mark.parametrize("plan", [SPLIT, HEADS, DOWN], ids=["split", "heads", "down"])
def test_quantize_pack(plan: LinearPlan, nibbles: bool) -> None:
    x = _randn(5, plan.columns)
    dense = _dense(plan)
    rows, scale, _ = fused.quantize_pack(
        x, plan.flat_segments(), plan.group_bits, plan.hadamard_groups, dense, plan.weight_group, nibbles
    )
    layout = ActivationLayout(plan, nibbles)
    assert layout.packed_low == nibbles
    assert rows.shape == (5, layout.row_bytes)
    codes, expected_scale, _ = reference.quantize_activation(x, plan)
    torch.testing.assert_close(scale, expected_scale, rtol=2e-6, atol=0)
    if dense is None:
        assert torch.equal(layout.unpack(rows), codes)
    assert torch.equal(layout.pack(layout.unpack(rows)), rows)


def test_rms_norm_quantize_replaces_the_residual() -> None:
    x, residual, weight = _randn(3, 256), _randn(4, 256)[:3], _randn(256)
    normed, total = reference.rms_norm(x, residual, weight, 1e-5)
    kept = residual.clone()
    rows, scale, zero = fused.rms_norm_quantize(x, kept, weight, 1e-5, SPLIT.flat_segments(), SPLIT.group_bits)
    assert torch.equal(kept, total)
    codes, expected_scale, expected_zero = reference.quantize_activation(normed, SPLIT)
    assert torch.equal(ActivationLayout(SPLIT).unpack(rows), codes)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(zero, expected_zero)


def test_silu_mul_quantize() -> None:
    gate_up = _randn(2, 2 * 256)
    rows, scale, _ = fused.silu_mul_quantize(gate_up, SPLIT.flat_segments(), SPLIT.group_bits, nibbles=True)
    gate, up = gate_up.chunk(2, dim=-1)
    codes, expected, _ = reference.quantize_activation(torch.nn.functional.silu(gate) * up, SPLIT)
    torch.testing.assert_close(scale, expected, rtol=2**-7, atol=0)
    assert (ActivationLayout(SPLIT, True).unpack(rows).int() - codes.int()).abs().max() <= 2


@pytest.mark.parametrize("nibbles", [False, True])
def test_shapes_for_torch_compile(nibbles: bool) -> None:
    down = (DOWN.flat_segments(), list(DOWN.group_bits), DOWN.hadamard_groups, _dense(DOWN), 0, nibbles)
    split = (SPLIT.flat_segments(), list(SPLIT.group_bits), 0, nibbles)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.resq.quantize_pack.default, (_randn(3, 768), *down), test_utils=tests)
    torch.library.opcheck(torch.ops.resq.silu_mul_quantize.default, (_randn(3, 1536), *down), test_utils=tests)
    for residual in (None, _randn(3, 256)):
        arguments = (_randn(3, 256), residual, _randn(256), 1e-5, *split)
        torch.library.opcheck(torch.ops.resq.rms_norm_quantize.default, arguments, test_utils=tests)


def test_bad_segments_are_a_sentence() -> None:
    with pytest.raises(RuntimeError, match="x must have shape"):
        fused.quantize_pack(_randn(2, 255), SPLIT.flat_segments(), SPLIT.group_bits)
