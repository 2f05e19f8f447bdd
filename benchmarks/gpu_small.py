"""`python -m benchmarks.gpu_small`: every CUDA op once on small shapes, for compute-sanitizer; prints what it ran.

`--kernels wgmma` runs only those GEMMs, with what makes their input; `--kernels others` everything else.
"""

from __future__ import annotations

import argparse
import sys

import torch

from resq_vllm import fused, ops
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.hadamard import hadamard_matrix
from resq_vllm.quantized_linear import KERNELS, linear_quantized, runs_on

PLANS = {
    "qkv": linear_plan(LinearSite(low=224, high=32), 256, 64),
    "o": linear_plan(LinearSite(low=224, high=32, scales="head", order="heads"), 256, 64),
    "down": linear_plan(LinearSite(low=768, high=0, scales="block", hadamard_groups=8), 768, 64),
    "power": linear_plan(LinearSite(low=1024, high=0, scales="block", hadamard_groups=2), 1024, 64),
}


def chosen(kernels: str, major: int, plan: LinearPlan, tokens: int) -> list[tuple[str, int]]:
    """GEMMs of a family ("wgmma", "others" or "all") that ``tokens`` rows can get on the chip, with their splits."""
    return [
        (kernel, 2 if splits else 1)
        for kernel, (most, splits) in KERNELS.items()
        if runs_on(kernel, major, plan)
        and (not most or tokens <= most)
        and (kernels == "all" or (kernels == "wgmma") == kernel.startswith("wgmma"))
    ]


def run(plan: LinearPlan, tokens: int, outputs: int, kernels: str) -> list[str]:
    """The quantize ops, unless ``kernels`` is "wgmma", and linear layers of ``plan``; the GEMMs that ran."""
    g = torch.Generator("cuda").manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=g)

    k = plan.hadamard_k
    dense = hadamard_matrix(k).float().cuda() if k > 1 else None
    segments, bits = plan.flat_segments(), list(plan.group_bits)
    x = random(tokens, plan.columns)
    for nibbles in (False, True) if kernels != "wgmma" else ():
        fused.quantize_pack(x, segments, bits, plan.hadamard_groups, dense, 0, nibbles)
        fused.silu_mul_quantize(
            random(tokens, 2 * plan.columns), segments, bits, plan.hadamard_groups, dense, 0, nibbles
        )
        if not plan.hadamard_groups:
            weight = random(plan.columns)
            fused.rms_norm_quantize(x, random(tokens, plan.columns), weight, 1e-5, segments, bits, 0, nibbles)
    if kernels != "wgmma":
        ops.quantize_activation(x, segments, bits, plan.hadamard_groups, dense)
    if kernels != "wgmma" and plan.hadamard_groups:
        ops.hadamard(x, plan.hadamard_groups, dense)
    low, high = plan.part_columns
    codes = torch.randint(0, 255, (outputs, low // 2), dtype=torch.uint8, device="cuda") if low else None
    bytes_ = torch.randint(-127, 127, (outputs, high), dtype=torch.int8, device="cuda") if high else None
    packed, sums = ops.pack_weight(codes, bytes_, 4, outputs, segments)
    scales = torch.rand(plan.scale_rows, outputs, device="cuda")
    if kernels != "wgmma":
        ops.linear(x, packed, scales, sums, random(outputs), outputs, segments, bits, plan.hadamard_groups, dense)
    quantized = fused.quantize_pack(x, segments, bits, plan.hadamard_groups, dense)
    major = torch.cuda.get_device_capability()[0]
    found = chosen(kernels, major, plan, tokens)
    for kernel, splits in found:
        tail = (packed, scales, sums, None, outputs, segments, bits, torch.bfloat16, 0, kernel, splits)
        linear_quantized(quantized, *tail)
    return [kernel for kernel, _ in found]


def main() -> int:
    """Run everything; the exit status is the sanitizer's business."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=("all", "wgmma", "others"), default="all", help="GEMMs to run [all]")
    kernels = parser.parse_args().kernels
    if not torch.cuda.is_available():
        print("benchmarks.gpu_small needs an NVIDIA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    for name, plan in PLANS.items():
        ran = {kernel for tokens in (1, 5, 40) for kernel in run(plan, tokens, 144, kernels)}
        torch.cuda.synchronize()
        print(f"{name}: ran {', '.join(sorted(ran)) or 'no GEMM: this chip has none of these'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
