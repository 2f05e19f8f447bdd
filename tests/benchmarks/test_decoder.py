"""The benchmark of a step's decoder layers: equal contenders, rows, arguments."""

from __future__ import annotations

import pytest
import torch
import typer

from benchmarks import decoder
from benchmarks.dummy_model import Shape
from resq_vllm import ops

SHAPE = Shape(128, 256, 3, 4, 2, 32)


@pytest.mark.parametrize(("streams", "context"), [(1, 20), (3, 33)])
def test_contenders_give_the_same(streams: int, context: int) -> None:
    isa = ops.isa()
    results = [call() for call in decoder.contenders(decoder.Step(SHAPE, streams, context)).values()]
    assert ops.isa() == isa
    for y, residual in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(residual, results[0][1])
    assert results[0][0].shape == (streams, SHAPE.hidden_size)
    assert torch.isfinite(results[0][0]).all()


def test_rows() -> None:
    rows = decoder.measure_step(SHAPE, 2, 20, 1, 0.0)
    assert [row["contender"] for row in rows][:2] == ["ops", "stack"]
    assert rows[0]["ratio"] == 1.0
    assert all(row["median_ms"] > 0 and row["rounds"] == 1 for row in rows)
    assert decoder.table(rows).row_count == len(rows)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="--shape 3b is not known; known are small, 1b, 8b"):
        decoder.main(shape="3b")
