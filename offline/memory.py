"""The memory that a run needed, said at its end, and what it is allowed to need."""

from __future__ import annotations

import re
import resource
from math import prod
from pathlib import Path

from offline.models.adapter import ModelAdapter

GIB = 2**30
_STATUS = Path("/proc/self/status")
_FLOAT_BYTES = 4


def peak_memory() -> float:
    """Largest resident size of this process so far, in GiB."""
    # Linux counts what the parent had at the time of a fork to ru_maxrss, VmHWM only this program.
    return _status("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident_memory() -> float:
    """Resident size of this process now, in GiB; 0 where the system does not tell."""
    return _status("VmRSS", 0)


def memory_bound(adapter: ModelAdapter, calibration_tokens: int) -> float:
    """What quantizing a model may take beside the program itself, in GiB.

    The embedding, two decoder layers and the calibration activations of the float and the quantized model, in float32.
    """
    shapes = (adapter.layer_shapes(index) for index in range(adapter.num_layers))
    layer = max(sum(prod(shape) for shape in tensors.values()) for tensors in shapes)
    embedding = prod(adapter.model_shapes()[adapter.embedding])
    return _FLOAT_BYTES * (embedding + 2 * layer + 2 * calibration_tokens * adapter.hidden_size) / GIB


def _status(field: str, otherwise: int) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    return (int(found[1]) if found else otherwise) / 2**20
