"""RoPE, and a stack of decoder layers in one op: equal to the separate ops."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_vllm import ops, reference
from resq_vllm.decoder_stack import DecoderStack
from tests.csrc.decoder_stack import Stack, cos_sin_cache
from tests.csrc.support import ISAS, assert_identical, generator, running

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    rest=st.integers(0, 70),
    half=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_rope_of_any_shape(tokens: int, heads: int, rest: int, half: int, dtype: torch.dtype, seed: int) -> None:
    g = generator(seed)
    x = torch.randn(tokens, heads * 2 * half + rest, generator=g).to(dtype)
    cache = cos_sin_cache(64, 2 * half, dtype)
    positions = torch.randint(0, 64, (tokens,), generator=g)
    for isa in ISAS:
        with running(isa):
            ours = x.clone()
            ops.rope(ours, positions, cache, heads)
            assert_identical(ours, reference.rope(x, positions, cache, heads), isa)


def test_rope_of_rows_that_are_part_of_wider_ones_and_of_many_tokens() -> None:
    x = torch.randn(900, 3 * 64 + 40, generator=generator(1)).bfloat16()
    cache, positions = cos_sin_cache(900, 64, torch.bfloat16), torch.arange(900).flip(0)
    expected = x.clone()
    expected[:, 20:] = reference.rope(x[:, 20:].contiguous(), positions, cache, 3)
    ops.rope(x[:, 20:], positions, cache, 3)
    assert_identical(x, expected, "default")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"x": torch.zeros(3, 64, 1)}, "x must have shape"),
        ({"x": torch.zeros(3, 60)}, "60 columns, too few for 2 heads of 32"),
        ({"positions": torch.tensor([0, 1, 8])}, "positions names 8"),
        ({"positions": torch.tensor([0, -1, 1])}, "positions names -1"),
        ({"positions": torch.tensor([0, 1])}, "positions must have shape"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions must be int64"),
        ({"cos_sin_cache": torch.zeros(8, 31)}, "cos_sin_cache must have shape"),
        ({"cos_sin_cache": torch.zeros(8, 32).bfloat16()}, "cos_sin_cache must have x's dtype"),
    ],
)
def test_rope_names_bad_arguments(changed: dict[str, Any], sentence: str) -> None:
    good = {"x": torch.zeros(3, 64), "positions": torch.zeros(3, dtype=torch.int64)}
    arguments = {**good, "cos_sin_cache": torch.zeros(8, 32), "heads": 2, **changed}
    with pytest.raises(RuntimeError, match=sentence):
        ops.rope(**arguments)


BATCH = ("qkv", "residual", "positions", "slot_mapping", "block_table", "seq_lens", "query_start_loc")


def made(arguments: dict[str, Any]) -> tuple[DecoderStack, dict[str, Any], dict[str, Any]]:
    """A stack, what it was made of, and the batch."""
    own = {name: value for name, value in arguments.items() if name not in BATCH}
    return DecoderStack(**own), own, {name: arguments[name] for name in BATCH}


def together(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    stack, _, batch = made(arguments)
    return stack(**batch)


def test_threads_that_quantize_the_same_rows_all_read_the_residual_before_its_sum() -> None:
    """Each has a part of a wide gate_up and norms the rows for itself, whoever is first."""
    stack = Stack(torch.bfloat16, [0, 1], [5], [-1, -1], intermediate=2048)
    expected = stack.separately(stack.caches())
    kept, _, batch = made(stack.arguments(stack.caches()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the tests' own default is one
    try:
        results = [kept(**batch) for _ in range(300)]
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert_identical(result, expected, "default")


# A step of three sequences, one sequence alone, a prompt with a step of another sequence, and a batch without tokens.
BATCHES = [([0, 1, 2, 3], [5, 32, 1]), ([0, 1], [70]), ([0, 33, 34], [40, 18]), ([0, 0], [7])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("starts", "lens"), BATCHES)
@pytest.mark.parametrize("ends_in_mlp", [True, False])
def test_a_stack_is_its_separate_ops(starts: list[int], lens: list[int], dtype: torch.dtype, ends_in_mlp: bool) -> None:
    stack = Stack(dtype, starts, lens, [-1, 9, -1], ends_in_mlp)
    before = stack.qkv.clone(), stack.residual.clone()
    for isa in ISAS:
        with running(isa):
            apart, joined = stack.caches(), stack.caches()
            expected = stack.separately(apart)
            assert_identical(together(**stack.arguments(joined)), expected, isa)
            assert_identical(joined, apart, isa)
    assert_identical((stack.qkv, stack.residual), before, "inputs")


def test_padding_after_the_batch_changes_nothing() -> None:
    stack = Stack(torch.bfloat16, [0, 1, 2], [5, 20], [-1, -1])
    expected = together(**stack.arguments(stack.caches()))
    stack.qkv, stack.residual = (torch.cat((t, t[:1])) for t in (stack.qkv, stack.residual))
    stack.positions = torch.cat((stack.positions, torch.tensor([0])))
    assert_identical(tuple(t[:2] for t in together(**stack.arguments(stack.caches()))), expected, "padded")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weights": lambda w: w[:-1]}, "as many layers as there are kv_caches"),
        ({"weights": lambda w: [*w[:26], None, *w[27:]]}, r"weights\[26\] is missing"),
        ({"epsilons": lambda e: e[1:]}, "as many layers as there are kv_caches"),
        ({"layouts": lambda e: e[1:]}, "as many layers as there are kv_caches"),
        ({"kv_caches": lambda c: c[:1]}, "as many layers as there are kv_caches"),
        ({"kv_caches": lambda c: []}, "as many layers as there are kv_caches"),
        ({"kv_caches": lambda c: [c[0], c[1][:, :1]]}, "key has 2 heads, but the cache has 1"),
        ({"positions": lambda p: p + 96}, "positions names"),
        ({"qkv": lambda x: x[:, 1:]}, r"qkv must have shape \[tokens, 256\] with contiguous rows, not \[2, 255\]"),
        ({"query_heads": lambda h: 50}, "o's input of layer 0 has 128 columns, not 1600"),
        ({"residual": lambda r: r[:1]}, r"residual must have shape \[2, 128\], not \[1, 128\]"),
        ({"residual": lambda r: r.half()}, "residual must have qkv's dtype"),
        ({"cos_sin_cache": lambda c: c.float()}, "the norm's weight must have cos_sin_cache's dtype"),
        ({"qkv": lambda x: x.float()}, "cos_sin_cache must have qkv's dtype"),
        ({"weights": lambda w: [*w[:7], *w[13:19], *w[13:]]}, "gate_up's input of layer 0 has 256 columns, not 128"),
        ({"weights": lambda w: [*w[:7], *w[20:26], *w[13:]]}, "gate_up has 256 outputs, not twice down's 256"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], sentence: str) -> None:
    stack = Stack(torch.bfloat16, [0, 1, 2], [5, 20], [-1, -1])
    arguments = stack.arguments(stack.caches())
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=sentence):
        together(**arguments)


def test_a_stack_is_kept_from_step_to_step_and_sees_new_memory_of_its_tensors() -> None:
    stack = Stack(torch.bfloat16, [0, 1, 2], [5, 20], [-1, -1])
    kept, arguments, batch = made(stack.arguments(stack.caches()))
    first = kept(**batch)
    assert_identical(kept(**batch), first, "again")
    for tensor in (t for t in arguments["weights"] if t is not None and t.dtype == torch.bfloat16):
        tensor.data = tensor.data * 2
    changed = kept(**batch)
    assert not torch.equal(changed[0], first[0])
    assert_identical(changed, DecoderStack(**arguments)(**batch), "anew")


def test_a_stack_knows_its_tensors() -> None:
    stack = Stack(torch.bfloat16, [0, 1], [5], [-1])
    kept, own, _ = made(stack.arguments(stack.caches()))
    tensors = [own[name] for name in ("cos_sin_cache", "weights", "kv_caches", "rotations")]
    assert kept.has(*tensors)
    assert not kept.has(tensors[0].clone(), *tensors[1:])
    assert not kept.has(tensors[0], tensors[1][:-1], *tensors[2:])


def test_a_stack_that_is_gone_lets_go_of_its_tensors() -> None:
    stack = Stack(torch.bfloat16, [0, 1], [5], [-1])
    kept, own, batch = made(stack.arguments(stack.caches()))
    storage = own["weights"][0].untyped_storage()
    del stack, own, batch
    gc.collect()
    held = torch._C._storage_Use_Count(storage._cdata)
    del kept
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) == held - 1


def test_a_tensor_that_no_longer_fits_is_named_until_it_does() -> None:
    stack = Stack(torch.bfloat16, [0, 1, 2], [5, 20], [-1, -1])
    kept, arguments, batch = made(stack.arguments(stack.caches()))
    expected = kept(**batch)
    norm = arguments["weights"][26 + 6]
    good, norm.data = norm.data, norm.data[:-1].clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the norm's weight must have shape \[128\]"):
            kept(**batch)
    norm.data = good
    assert_identical(kept(**batch), expected, "mended")
