"""One thread for torch's own ops: these models are so small that waking a second one costs more than it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    # On a busy machine the difference is tenfold: each of many thousand small ops waits for a core to come free.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
