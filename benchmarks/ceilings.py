"""What the machine can do at most, measured: DRAM read bandwidth, int8 and bf16 multiply-adds, all threads together."""

from __future__ import annotations

import itertools
import mmap
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks import stock_ops
from benchmarks.turns import Call, best_rate

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
READ_BYTES = 2**30
# Short enough that a neighbour's interruption spoils only some of the tries.
CHUNK_BYTES = 2**26
EDGES = (1024, 2048)
SECONDS = 2.0
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

Arithmetic = Literal["int8", "bf16"]


def cache_bytes(folder: Path = CACHES) -> int:
    """Size of the largest cache that core 0 sees, 0 where the system does not say."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()) for path in folder.glob("index*/size")]
    return max((int(found[1]) * _UNITS[found[2]] for found in sizes if found), default=0)


def huge_pages(size: int) -> torch.Tensor:
    """float32 numbers of `size` bytes, backed with huge pages where the system has them: fewer TLB misses."""
    area = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.float32).fill_(1.0)


def dram_read_bytes_per_second(size: int = READ_BYTES, seconds: float = SECONDS) -> float:
    """Best of sums and matrix-vector products over pieces of a memory larger than the caches, in bytes a second."""
    matrix = huge_pages(size).view(-1, 4096)
    vector = torch.ones(4096)
    pieces = itertools.cycle(matrix.split(max(1, CHUNK_BYTES // (4 * 4096))))
    reads = (lambda: torch.sum(next(pieces)), lambda: torch.mv(next(pieces), vector))
    piece = min(size, CHUNK_BYTES)
    return piece * max(best_rate(read, seconds / len(reads)) for read in reads)


def _products(arithmetic: Arithmetic, edge: int) -> list[Call]:
    """Square products through the libraries at hand: torch, and vLLM's oneDNN and AMX kernels."""
    x, y = (torch.randn(edge, edge).bfloat16() for _ in range(2))
    if arithmetic == "bf16":
        calls: list[Call] = [lambda: torch.mm(x, y)]
        if stock_ops.op_reason("create_onednn_mm_handler", "onednn_mm") is None:
            packed = stock_ops.onednn_bf16(y)
            calls.append(lambda: packed(x))
        if stock_ops.sgl_reason() is None:
            tiles = stock_ops.sgl_pack(y)
            calls.append(lambda: stock_ops.sgl_bf16_linear(x, tiles))
        return calls
    codes = torch.randint(-127, 128, (edge, edge), dtype=torch.int8)
    calls = [lambda: torch._int_mm(codes, codes)]
    if stock_ops.sgl_reason() is None:
        scale, tiles = torch.ones(edge), stock_ops.sgl_pack(codes)
        # It quantizes x on the way, in a few hundredths of the time.
        calls.append(lambda: stock_ops.sgl_int8_linear(x, tiles, scale))
    return calls


def operations_per_second(arithmetic: Arithmetic, edges: Sequence[int] = EDGES, seconds: float = SECONDS) -> float:
    """Best rate of square matrix products that stay in the caches, two operations a multiply-add."""
    tries = [(2 * edge**3, product) for edge in edges for product in _products(arithmetic, edge)]
    return max(work * best_rate(product, seconds / len(tries)) for work, product in tries)


@dataclass(frozen=True)
class Ceilings:
    """Measured maxima: `dram_gb_s` in 10^9 bytes a second, the others in 10^12 operations a second."""

    dram_gb_s: float
    int8_top_s: float
    bf16_top_s: float

    def seconds(self, weight_bytes: int, operations: float, arithmetic: Arithmetic) -> tuple[float, str]:
        """Least time to read the weights and do the operations, and which of them takes it: memory or compute."""
        reading = weight_bytes / (self.dram_gb_s * 1e9)
        computing = operations / ((self.int8_top_s if arithmetic == "int8" else self.bf16_top_s) * 1e12)
        return (reading, "memory") if reading >= computing else (computing, "compute")

    def to_dict(self) -> dict[str, float]:
        """JSON form, three significant digits."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}


def measured_ceilings() -> Ceilings:
    """The ceilings of this machine with the threads that torch has now."""
    return Ceilings(
        dram_read_bytes_per_second() / 1e9,
        operations_per_second("int8") / 1e12,
        operations_per_second("bf16") / 1e12,
    )
