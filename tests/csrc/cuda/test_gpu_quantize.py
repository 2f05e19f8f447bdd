"""The quantize and Hadamard ops on a GPU: codes, scales and zero points equal the reference's bit for bit."""

from __future__ import annotations

import pytest
import torch

from resq_vllm import cuda, fused, ops, reference
from resq_vllm.formats.activations import ActivationLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, Segment, linear_plan
from resq_vllm.hadamard import hadamard_matrix, hadamard_order

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda.load()[0] is None,
    reason="needs an NVIDIA GPU, a PyTorch with CUDA and the CUDA kernels",
)

PLANS = {
    "qkv": linear_plan(LinearSite(low=3584, high=512), 4096, 128),
    "odd": LinearPlan((Segment(787, 0, 0), Segment(109, 1, 1)), (4, 8)),
    "heads": linear_plan(LinearSite(low=3584, high=512, scales="head", order="heads"), 4096, 128),
    "token8": linear_plan(LinearSite(low=3584, high=512, scales="token", act_low_bits=8, order="heads"), 4096, 128),
    "groups": linear_plan(LinearSite(low=3584, high=512, weight_group=128), 4096, 128),
    "wide": LinearPlan((Segment(28672, 0, 0),), (4,)),
    "power": linear_plan(LinearSite(low=8192, high=0, scales="block", hadamard_groups=4), 8192, 128),
    "one block": LinearPlan((Segment(16384, 0, 0),), (4,), hadamard_groups=1),
}
DOWN = {
    f: linear_plan(LinearSite(low=f, high=0, scales="block", hadamard_groups=8), f, 128) for f in (14336, 11008, 18944)
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def on_gpu() -> None:
    cuda.require(torch.cuda.current_device())


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _arguments(plan: LinearPlan, nibbles: bool) -> tuple:
    k = plan.hadamard_k
    dense = hadamard_matrix(k).float().cuda() if k > 1 else None
    return plan.flat_segments(), plan.group_bits, plan.hadamard_groups, dense, plan.weight_group, nibbles


@pytest.mark.parametrize("nibbles", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("name", PLANS)
def test_quantize_pack(name: str, rows: int, dtype: torch.dtype, nibbles: bool) -> None:
    plan = PLANS[name]
    x = _randn(rows, plan.columns, dtype=dtype)
    ours = fused.quantize_pack(x.cuda(), *_arguments(plan, nibbles))
    codes, scale, zero = reference.quantize_activation(x, plan)
    assert torch.equal(ours[1].cpu(), scale)
    assert torch.equal(ours[2].cpu(), zero)
    assert torch.equal(ours[0].cpu(), ActivationLayout(plan, nibbles).pack(codes))
    in_columns = ops.quantize_activation(x.cuda(), *_arguments(plan, nibbles)[:4])
    assert torch.equal(in_columns[0].cpu(), codes)


@pytest.mark.parametrize("n", [8, 256, 1024, 16384, 28 * 64, 28 * 512, 344 * 4, 148 * 16, 924 * 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard(n: int, dtype: torch.dtype) -> None:
    k = hadamard_order(n)
    x = _randn(5, 2 * n, dtype=dtype)
    y = ops.hadamard(x.cuda(), 2, hadamard_matrix(k).float().cuda() if k > 1 else None).cpu()
    expected = reference.block_hadamard(x.float(), 2).to(dtype)
    if k == 1:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("width", DOWN)
def test_down_with_a_dense_factor(width: int, rows: int) -> None:
    plan = DOWN[width]
    gate_up = _randn(rows, 2 * width)
    ours = fused.silu_mul_quantize(gate_up.cuda(), *_arguments(plan, False))
    codes, scale, _ = reference.quantize_activation(reference.silu_mul(gate_up), plan)
    torch.testing.assert_close(ours[1].cpu(), scale, rtol=2**-7, atol=0)
    difference = (ActivationLayout(plan).unpack(ours[0].cpu()).int() - codes.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
def test_norm(rows: int, add: bool) -> None:
    plan = PLANS["qkv"]
    x, residual, weight = _randn(rows, 4096), _randn(rows + 1, 4096)[:rows], _randn(4096)
    kept = residual.cuda() if add else None
    ours = fused.rms_norm_quantize(x.cuda(), kept, weight.cuda(), 1e-5, plan.flat_segments(), plan.group_bits)
    normed, total = reference.rms_norm(x, residual if add else None, weight, 1e-5)
    if kept is not None:
        assert torch.equal(kept.cpu(), total)
    codes, scale, _ = reference.quantize_activation(normed, plan)
    torch.testing.assert_close(ours[1].cpu(), scale, rtol=2**-7, atol=0)
    difference = (ActivationLayout(plan).unpack(ours[0].cpu()).int() - codes.int()).abs()
    assert difference.max() <= 3
    assert (difference > 0).float().mean() < 0.02


def test_in_a_cuda_graph() -> None:
    plan = PLANS["qkv"]
    arguments = _arguments(plan, False)
    x, weight = _randn(4, 4096).cuda(), _randn(4096).cuda()
    fused.quantize_pack(x, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = fused.quantize_pack(x, *arguments)
        normed = fused.rms_norm_quantize(x, None, weight, 1e-5, *arguments[:2])
    x.copy_(_randn(5, 4096)[:4])
    graph.replay()
    for ours, again in zip(rows, fused.quantize_pack(x, *arguments), strict=True):
        assert torch.equal(ours, again)
    for ours, again in zip(normed, fused.rms_norm_quantize(x, None, weight, 1e-5, *arguments[:2]), strict=True):
        assert torch.equal(ours, again)


def test_a_row_that_shared_memory_cannot_hold_is_a_sentence() -> None:
    plan = LinearPlan((Segment(2**17, 0, 0),), (4,), hadamard_groups=1)
    with pytest.raises(RuntimeError, match="bytes of shared memory, but this GPU has"):
        fused.quantize_pack(torch.zeros(1, 2**17, device="cuda"), *_arguments(plan, False))
