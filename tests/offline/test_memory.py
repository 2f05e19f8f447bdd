"""The figures at the end of a run: what they count, and that they are those of this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offline.memory import memory_bound, peak_memory, resident_memory
from offline.models.source import ModelSource
from tests.offline.models.tiny import save_tiny


def test_bound_counts_embedding_two_layers_and_two_sets_of_activations(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    adapter = ModelSource.open(tmp_path).adapter
    d, f, kv = adapter.hidden_size, adapter.intermediate_size, adapter.num_kv_heads * adapter.head_dim
    layer = 2 * d * adapter.num_heads * adapter.head_dim + 2 * d * kv + 3 * d * f + 2 * d
    vocabulary = adapter.model_shapes()[adapter.embedding][0]
    expected = 4 * (vocabulary * d + 2 * layer + 2 * 1000 * d) / 2**30
    assert memory_bound(adapter, 1000) == pytest.approx(expected)


def test_peak_is_that_of_this_process_alone() -> None:
    """A process that a large one starts has not been large itself."""
    size = 1 << 30  # more than the child's own imports take
    child = "from offline.memory import peak_memory; print(peak_memory())"
    room = bytearray(b"x") * size
    found = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert len(room) == size
    assert float(found.stdout) < size / 2**30
    assert peak_memory() >= resident_memory() > size / 2**30
