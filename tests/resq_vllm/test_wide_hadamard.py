"""Blocks too wide for one CTA, with a stand-in for the package: which rows need it, and what it gives."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import fused, reference, wide_hadamard
from resq_vllm.config import ResQConfig
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.hadamard import hadamard_matrix, sylvester
from resq_vllm.linear import _linear_by_lists
from tests.resq_vllm.conftest import FFN, HIDDEN, quantization_config
from tests.resq_vllm.test_linear import checkpoint_tensors, close, expected, inputs, load, row_layer

CUDA = torch.device("cuda", 0)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """fast_hadamard_transform by its definition; the list grows by the input of every call."""
    calls: list[torch.Tensor] = []

    def hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        calls.append(x)
        assert x.shape[-1] & (x.shape[-1] - 1) == 0
        return (x.double() @ sylvester(x.shape[-1]) * scale).to(x)

    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", SimpleNamespace(hadamard_transform=hadamard_transform))
    return calls


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A GPU without room for a transform; the list: whether a transform was asked for."""
    asked: list[bool] = []

    def refusal(plan: LinearPlan, device: torch.device, dtype: torch.dtype, transform: bool) -> str | None:
        asked.append(transform)
        assert transform or dtype == torch.float32
        return f"a row of {plan.columns} columns needs too much; use more groups" if transform else None

    monkeypatch.setattr(wide_hadamard, "_refusal", refusal)
    wide_hadamard.needed.cache_clear()
    yield asked
    wide_hadamard.needed.cache_clear()


def plan_of(columns: int, groups: int) -> LinearPlan:
    return linear_plan(LinearSite(low=columns, high=0, scales="block", hadamard_groups=groups), columns, 128)


@pytest.mark.parametrize(("columns", "groups"), [(512, 1), (1536, 1), (3072, 4), (1408, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_the_references(columns: int, groups: int, dtype: torch.dtype, package: list[torch.Tensor]) -> None:
    x = torch.randn(3, 2, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    k = plan_of(columns, groups).hadamard_k
    dense = hadamard_matrix(k).float() if k > 1 else None
    found = torch.ops.resq.wide_hadamard(x, groups, dense)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    exact = reference.block_hadamard(x.double(), groups)
    allowed = float((reference.block_hadamard(x.float(), groups).double() - exact).abs().max())
    assert float((found.double() - exact).abs().max()) <= 2 * allowed
    assert package[0].shape == (6 * groups * k, columns // groups // k)
    torch.library.opcheck(torch.ops.resq.wide_hadamard.default, (x, groups, dense))


def test_rows_that_fit_stay_in_our_kernel(refused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wide_hadamard.needed(plan_of(1536, 1), torch.device("cpu"), torch.bfloat16)
    assert not wide_hadamard.needed(linear_plan(LinearSite(low=64, high=0), 64, 64), CUDA, torch.bfloat16)
    assert not refused
    monkeypatch.setattr(wide_hadamard, "_refusal", lambda *arguments, transform: None)
    assert not wide_hadamard.needed(plan_of(1536, 1), CUDA, torch.bfloat16)


def test_refusal_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU's op, which has room for everything."""
    plan, cpu = plan_of(1536, 1), torch.device("cpu")
    assert wide_hadamard._refusal(plan, cpu, torch.bfloat16, transform=True) is None
    assert wide_hadamard._refusal(plan, cpu, torch.float32, transform=False) is None

    def full(*arguments: Any) -> None:
        raise RuntimeError("a row needs 9 bytes\nsecond line")

    monkeypatch.setattr(fused, "quantize_pack", full)
    assert wide_hadamard._refusal(plan, cpu, torch.bfloat16, transform=True) == "a row needs 9 bytes"


def test_row_without_room_takes_the_package_and_the_log_says_so(
    refused: list[bool], package: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert wide_hadamard.needed(plan_of(1536, 1), CUDA, torch.bfloat16)
    assert "1536 columns runs in fast-hadamard-transform, in launches of its own, since a row of 1536" in caplog.text
    assert refused == [True, False]


def test_missing_package_is_named(refused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)
    with pytest.raises(ResQError, match=r"needs too much; use more groups, or install fast-hadamard-transform"):
        wide_hadamard.needed(plan_of(1536, 1), CUDA, torch.bfloat16)


def test_power_of_two_that_the_package_would_pad_is_refused(refused: list[bool], package: list[torch.Tensor]) -> None:
    with pytest.raises(ResQError, match=r"has no transform of 4 columns either"):
        wide_hadamard.needed(plan_of(1376, 1), CUDA, torch.bfloat16)  # 344·4


def test_layer_that_needs_it_gives_the_references_values(
    rank_of: Callable[[int, int], None], package: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's ops, called as on a GPU."""
    rank_of(0, 1)
    base = quantization_config(max_tp=1)
    config = ResQConfig.from_config(
        {**base, "sites": {**base["sites"], "down": base["sites"]["down"] | {"hadamard_groups": 1}}}
    )
    site = config.metadata.sites["down"]
    stored, plain = checkpoint_tensors(site, HIDDEN, 3)
    layer = row_layer(config, "mlp.down_proj", FFN)
    load(layer, stored)
    monkeypatch.setattr(wide_hadamard, "needed", lambda plan, device, dtype: True)
    layer.quant_method.process_weights_after_loading(layer)
    x = inputs(FFN)
    close(_linear_by_lists(layer, x, None), expected(x, plain, site))
    assert len(package) == 1
    assert _linear_by_lists(layer, x.bfloat16(), None).dtype == torch.bfloat16
