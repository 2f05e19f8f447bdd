"""Rival kernels: packing, and why one cannot be called."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import stock_ops


def test_missing_op_is_named() -> None:
    assert stock_ops.op_reason("onednn_mm") is None
    assert stock_ops.op_reason("onednn_mm", "no_such_op") == "this vLLM has no op no_such_op"


def test_zentorch_from_a_folder_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "zentorch", None)
    reason = stock_ops.zentorch_reason(tmp_path)
    assert reason is not None
    assert reason.startswith("zentorch cannot be imported (")


def test_eight_codes_make_a_word_first_lowest() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0] * 2], dtype=torch.int32)
    assert stock_ops._pack_columns(codes).tolist() == [[0x07654321] * 2]
    assert stock_ops.wna16_pack(torch.ones(32, 64, dtype=torch.int32)).shape == (2, 128)
