"""The CUDA linear ops on a GPU, where there is one: every kernel equals the reference bit for bit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_checks import failures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_kernel_equals_the_reference() -> None:
    assert failures(torch.cuda.get_device_capability()[0]) == []
