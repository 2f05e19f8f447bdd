"""The parameterisation: U = U_initial · blkdiag(R)."""

from __future__ import annotations

import pytest
import torch

from offline.bases.bases import Rotations
from offline.bases.rotation import haar_orthogonal, named_generator
from offline.rotate.trainable import RotationBlocks, TrainableRotations
from resq_vllm.errors import ResQError

D, HD, KV, LAYERS = 12, 8, 2, 3


def haar(n: int, *name: int | str) -> torch.Tensor:
    return haar_orthogonal(n, named_generator(0, *name))


def some_rotations() -> Rotations:
    value = [torch.stack([haar(HD, "v", i, t) for t in range(KV)]) for i in range(LAYERS)]
    return Rotations(haar(D, "r"), torch.stack(value), torch.stack([haar(HD, "k", i) for i in range(LAYERS)]), 3, 2)


def set_random(trainable: TrainableRotations) -> None:
    with torch.no_grad():
        for position, parameter in enumerate(trainable.parameters()):
            for i, matrix in enumerate(parameter.view(-1, *parameter.shape[-2:])):
                matrix.copy_(haar(matrix.shape[-1], "factor", position, i))


BLOCKS = [
    RotationBlocks((12,), (8,), share_value_heads=True),
    RotationBlocks((9, 3), (6, 2)),
    RotationBlocks((2, 7, 3), (1, 5, 2)),
    RotationBlocks((12, 0), (0, 8)),
]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_starts_at_the_initial_rotations(blocks: RotationBlocks) -> None:
    initial = some_rotations()
    found = TrainableRotations(initial, blocks).rotations()
    assert torch.equal(found.residual, initial.residual)
    assert torch.equal(found.value, initial.value)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_factors_are_block_diagonal_exactly(blocks: RotationBlocks) -> None:
    initial = some_rotations()
    trainable = TrainableRotations(initial, blocks)
    set_random(trainable)
    found = trainable.rotations()
    assert torch.equal(found.key, initial.key)
    assert (found.high_hidden, found.high_head) == (3, 2)
    factor = initial.residual.mT @ found.residual
    expected = torch.block_diag(*[p.detach() for p in trainable.residual])
    torch.testing.assert_close(factor, expected)
    for layer in range(LAYERS):
        for head in range(KV):
            factor = initial.value[layer, head].mT @ found.value[layer, head]
            one = 0 if blocks.share_value_heads else head
            torch.testing.assert_close(factor, torch.block_diag(*[p.detach()[layer, one] for p in trainable.value]))
    # The span of each block's columns is what it was.
    start = 0
    for width in blocks.residual:
        before, after = (m[:, start : start + width] for m in (initial.residual, found.residual))
        torch.testing.assert_close(after @ after.mT, before @ before.mT)
        start += width


def test_a_block_depends_on_its_own_factor_alone() -> None:
    trainable = TrainableRotations(some_rotations(), RotationBlocks((9, 3), (6, 2)))
    residual, value = trainable()
    low, high = trainable.residual
    torch.autograd.backward(residual[:, 9:].pow(3).sum() + value[..., :6].pow(3).sum())
    assert low.grad is not None
    assert high.grad is not None
    assert not bool(low.grad.any())
    assert bool(high.grad.any())
    grads = [p.grad for p in trainable.value]
    assert grads[0] is not None
    assert bool(grads[0].flatten(-2).any(-1).all())
    assert grads[1] is not None
    assert not bool(grads[1].any())


def test_kv_heads_share_or_do_not() -> None:
    shapes = [
        [tuple(p.shape) for p in TrainableRotations(some_rotations(), RotationBlocks((12,), (6, 2), share)).value]
        for share in (True, False)
    ]
    assert shapes == [[(LAYERS, 1, 6, 6), (LAYERS, 1, 2, 2)], [(LAYERS, KV, 6, 6), (LAYERS, KV, 2, 2)]]


@pytest.mark.parametrize(
    ("blocks", "name"),
    [
        (RotationBlocks((9, 4), (8,)), "residual"),
        (RotationBlocks((13, -1), (8,)), "residual"),
        (RotationBlocks((12,), (6, 1)), "value"),
        (RotationBlocks((), (8,)), "residual"),
    ],
)
def test_blocks_that_do_not_fill_the_columns(blocks: RotationBlocks, name: str) -> None:
    with pytest.raises(ResQError, match=rf"do not fill the \d+ columns of the {name} rotation; give widths"):
        TrainableRotations(some_rotations(), blocks)
