"""Registration: torch.library's own checks, torch.compile, and the choice of the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resq_vllm import ops
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from tests.csrc.support import ISAS, Weights, generator, random_cache, running

ROOT = Path(__file__).parents[2]
LAYOUT = KVLayout(64, 8)
SITES = {
    "split": LinearSite(low=224, high=32),
    "head": LinearSite(low=224, high=32, scales="head", order="heads"),
    "split_8bit_weights": LinearSite(low=98, high=14, weight_low_bits=8),
    "down": LinearSite(low=224, high=0, scales="block", hadamard_groups=2),
}


def _weights(name: str) -> Weights:
    site = SITES[name]
    return Weights(linear_plan(site, site.low + site.high, 64), 70, site.weight_low_bits, 0)


def _attention_arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    return table, torch.tensor([20], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize("name", SITES)
def test_library_checks_of_linear_ops(name: str) -> None:
    w = _weights(name)
    x = torch.randn(3, w.plan.columns)
    arguments = w.arguments
    calls = {
        torch.ops.resq.linear.default: (x, w.packed, w.scales, w.sums, torch.randn(70), 70, *arguments),
        torch.ops.resq.linear_planned.default: (x, w.packed, w.scales, w.sums, None, w.words, arguments[-1]),
        torch.ops.resq.quantize_activation.default: (x, *arguments),
    }
    if w.plan.hadamard_groups:
        calls[torch.ops.resq.hadamard.default] = (x, *arguments[2:])
    for op, call in calls.items():
        torch.library.opcheck(op, call)


@pytest.mark.parametrize("name", SITES)
def test_library_checks_of_pack_weight(name: str) -> None:
    w = _weights(name)
    low, high = w.plan.part_columns
    bits = SITES[name].weight_low_bits
    stored = torch.zeros(70, low // 2, dtype=torch.uint8) if bits == 4 else torch.zeros(70, low, dtype=torch.int8)
    codes = torch.zeros(70, high, dtype=torch.int8) if high else None
    torch.library.opcheck(torch.ops.resq.pack_weight.default, (stored, codes, bits, 70, w.plan.flat_segments()))


def test_library_checks_of_kv_ops() -> None:
    cache = random_cache(LAYOUT, 2, 2, 16, 1)
    key = torch.randn(3, 2, 64)
    slots, rotation = torch.tensor([0, 17, -1]), torch.eye(64)
    torch.library.opcheck(torch.ops.resq.kv_write.default, (key, key.clone(), cache, slots, rotation, 8, 4))
    query = torch.randn(3, 4, 64)
    torch.library.opcheck(
        torch.ops.resq.attention.default,
        (query, cache, torch.zeros_like(query), *_attention_arguments(), rotation, 0.125, 8, 4, -1),
    )
    torch.library.opcheck(
        torch.ops.resq.kv_write_attention.default,
        (query, key, key.clone(), cache, query.clone(), slots, *_attention_arguments(), rotation, 0.125, 8, 4, -1),
    )


def _step(
    x: torch.Tensor,
    w: Weights,
    down: Weights,
    cache: torch.Tensor,
    slots: torch.Tensor,
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every op once, with ordinary torch between them, as a decoder block has it."""
    y = w.apply(torch.nn.functional.silu(x))[:, :64]
    key = torch.stack((y, y * 2), dim=1)
    ops.kv_write(key, key + 1, cache, slots, None, LAYOUT.high, LAYOUT.low_bits)
    query = torch.cat((key, -key), dim=1)
    out = torch.empty_like(query)
    ops.attention(query, cache, out, *arguments, None, 0.125, LAYOUT.high, LAYOUT.low_bits)
    z = down.apply(out.flatten(1)[:, :224] * 0.5)
    codes, scale, _ = ops.quantize_activation(x, *w.arguments)
    packed, sums = ops.pack_weight(codes[:, :112].contiguous(), None, 4, x.shape[0], [224, 0, 0])
    return z + ops.hadamard(z[:, :64], 2).sum() + scale.sum(), packed.float().sum() + sums.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_function_equals_eager(dtype: torch.dtype) -> None:
    w, down = _weights("split"), _weights("down")
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 256, generator=generator(2)).to(dtype)
    cache = random_cache(LAYOUT, 2, 2, 16, 1)
    other = cache.clone()
    slots = torch.tensor([1, 2, 3])
    torch.testing.assert_close(
        compiled(x, w, down, cache, slots, _attention_arguments()),
        _step(x, w, down, other, slots, _attention_arguments()),
    )
    assert torch.equal(cache, other)
    assert not torch.equal(cache, random_cache(LAYOUT, 2, 2, 16, 1))


def test_inductor_keeps_the_order_of_writes_and_reads() -> None:
    """Its re-inplacing passes must see that kv_write changes the cache that attention then reads."""

    def step(key: torch.Tensor, query: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ops.attention(query, cache, out, *_attention_arguments(), None, 0.125, LAYOUT.high, LAYOUT.low_bits)
        ops.kv_write(key, key, cache, slots, None, LAYOUT.high, LAYOUT.low_bits)
        second = torch.empty_like(query)
        ops.attention(query, cache, second, *_attention_arguments(), None, 0.125, LAYOUT.high, LAYOUT.low_bits)
        return torch.stack((out, second))

    key, query = torch.randn(3, 2, 64, generator=generator(3)), torch.randn(3, 4, 64, generator=generator(4))
    slots = torch.tensor([1, 2, 3])
    cache = random_cache(LAYOUT, 2, 2, 16, 1)
    other = cache.clone()
    compiled = torch.compile(step, fullgraph=True)(key, query, cache, slots)
    expected = step(key, query, other, slots)
    torch.testing.assert_close(compiled, expected)
    assert torch.equal(cache, other)
    assert not torch.equal(expected[0], expected[1])


def test_every_instruction_set_can_be_chosen() -> None:
    assert "portable" in ISAS
    for name in ISAS:
        with running(name):
            assert ops.isa() == name
    assert ops.isa() == ISAS[0]


def test_unknown_instruction_set_is_named() -> None:
    with pytest.raises(
        ResQError, match="the instruction set is sse9, which is no known instruction set: choose one of"
    ):
        ops.set_isa("sse9")


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        ("portable", "portable"),
        ("sse9", "the environment variable RESQ_ISA is sse9, which is no known instruction set: choose one of"),
    ],
)
def test_environment_forces_the_instruction_set(forced: str, expected: str) -> None:
    code = (
        "from resq_vllm import ops\n"
        "from resq_vllm.errors import ResQError\n"
        "try:\n    print(ops.isa())\nexcept ResQError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "RESQ_ISA": forced}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(expected)
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("isa", "dtype", "low_bits", "decode", "prefill"),
    [
        ("amx_int8", torch.bfloat16, 4, "int8 AMX", "bfloat16 AMX"),
        ("amx_int8", torch.float16, 4, "int8 AMX", "float32 because the model is float16"),
        ("avx512_vnni", torch.float32, 4, *["float32 because the model is float32"] * 2),
        ("avx512_vnni", torch.bfloat16, 8, *["float32 because the cache's low part has 8 bits"] * 2),
        ("portable", torch.bfloat16, 4, *["float32 (the only one for portable)"] * 2),
    ],
)
def test_attention_kernels_are_named(isa: str, dtype: torch.dtype, low_bits: int, decode: str, prefill: str) -> None:
    if isa not in ISAS:  # what this machine cannot run, it cannot describe
        with pytest.raises(ResQError, match=isa):
            ops.set_isa(isa)
        return
    with running(isa):
        assert ops.attention_kernels(dtype, 64, 8, low_bits) == f"decode {decode}, prefill {prefill}"


def test_attention_kernels_of_an_unknown_dtype() -> None:
    with pytest.raises(RuntimeError, match="dtype must be bfloat16, float16 or float32, not int8"):
        ops.attention_kernels(torch.int8, 64, 8, 4)
