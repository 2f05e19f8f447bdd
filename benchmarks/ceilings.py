"""What the machine can do at most, measured: DRAM read bandwidth, int8 and bf16 multiply-adds, all threads together."""

from __future__ import annotations

import itertools
import mmap
import re
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
EDGE = 1024
SECONDS = 1.5
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

Arithmetic = Literal["int8", "bf16"]


def cache_bytes(folder: Path = CACHES) -> int:
    """Size of the largest cache that core 0 sees, 0 where the system does not say."""
    sizes = [re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()) for path in folder.glob("index*/size")]
    return max((int(found[1]) * _UNITS[found[2]] for found in sizes if found), default=0)


def _huge_pages(size: int) -> torch.Tensor:
    """float32 numbers of `size` bytes, backed with huge pages where the system has them: fewer TLB misses."""
    area = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.float32).fill_(1.0)


def dram_read_bytes_per_second(size: int = READ_BYTES, seconds: float = SECONDS) -> float:
    """Best of sums and matrix-vector products over pieces of a memory larger than the caches, in bytes a second."""
    matrix = _huge_pages(size).view(-1, 4096)
    vector = torch.ones(4096)
    pieces = itertools.cycle(matrix.split(max(1, CHUNK_BYTES // (4 * 4096))))
    reads = (lambda: torch.sum(next(pieces)), lambda: torch.mv(next(pieces), vector))
    piece = min(size, CHUNK_BYTES)
    return piece * max(best_rate(read, seconds / len(reads)) for read in reads)


def operations_per_second(arithmetic: Arithmetic, edge: int = EDGE, seconds: float = SECONDS) -> float:
    """Best rate of a square matrix product that stays in the caches, two operations a multiply-add.

    int8: the better of torch's product and vLLM's AMX kernel, which quantizes its input on the way.
    """
    work = 2 * edge**3
    if arithmetic == "bf16":
        a, b = (torch.randn(edge, edge).bfloat16() for _ in range(2))
        return work * best_rate(lambda: torch.mm(a, b), seconds)
    codes = torch.randint(-127, 128, (edge, edge), dtype=torch.int8)
    products: list[Call] = [lambda: torch._int_mm(codes, codes)]
    if stock_ops.sgl_int8_reason() is None:
        x, scale, packed = torch.randn(edge, edge).bfloat16(), torch.ones(edge), stock_ops.sgl_int8_pack(codes)
        products.append(lambda: stock_ops.sgl_int8_linear(x, packed, scale))
    return work * max(best_rate(product, seconds / len(products)) for product in products)


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
