"""The CUDA kernels' source compiled for the host, and linear layers in the formats of csrc/cuda."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from resq_vllm import reference
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.formats.weights import pack_int4

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PITCH, RUN = 128, 32


class Problem(ctypes.Structure):
    """struct Problem of emulation.cpp."""

    _fields_ = [
        ("spans", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_runs", "low_bits", "m", "n", "groups", "pitch")),
        ("part_at", ctypes.c_int64 * 2),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("low_row_bytes", ctypes.c_int64),
        ("high_row_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "x_scale", "x_zero", "weight_scale")),
        ("scale_rows", ctypes.c_int64),
        ("weight_sum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_type", "out_type", "raw_run", "splits", "grid", "seed")),
        ("out", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("conflicts", ctypes.c_uint64),
    ]


def compiled(source: str) -> ctypes.CDLL:
    """A file of this folder, which includes kernels and the emulator, as a library."""
    library = Path(mkdtemp(prefix="resq-emulation-")) / f"{Path(source).stem}.so"
    # g++ 12 warns about its own <vector> where a coroutine is switched (clobbered).
    flags = [
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-clobbered",
    ]
    include = [f"-I{HERE}", f"-I{SOURCES}"]
    command = ["g++", *flags, "-fPIC", "-shared", *include, str(HERE / source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@cache
def emulation() -> ctypes.CDLL:
    """The kernels on the host, compiled once a test run."""
    loaded = compiled("emulation.cpp")
    loaded.resq_packed_bytes.restype = ctypes.c_int64
    loaded.resq_kernel_name.restype = ctypes.c_char_p
    loaded.resq_kernel_shape.restype = ctypes.c_char_p
    return loaded


def padded(columns: int, multiple: int) -> int:
    return -(-columns // multiple) * multiple


@dataclass
class Layer:
    """A random quantized linear layer, as the reference and as the CUDA kernels take it."""

    plan: LinearPlan
    tokens: int
    outputs: int
    low_bits: int = 4
    seed: int = 0
    bias_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        plan, m, n = self.plan, self.tokens, self.outputs
        low, high = plan.part_columns
        limit = 8 if self.low_bits == 4 else 128
        self.low = torch.randint(-limit, limit, (n, low), generator=g).to(torch.int8)
        self.high = torch.randint(-128, 128, (n, high), generator=g).to(torch.int8)
        self.codes = torch.zeros(m, plan.columns, dtype=torch.uint8)
        start = 0
        for s in plan.segments:
            top = 2 ** plan.group_bits[s.group]
            self.codes[:, start : start + s.columns] = torch.randint(0, top, (m, s.columns), generator=g)
            start += s.columns
        top = torch.tensor([2**bits for bits in plan.group_bits])
        self.zero = (torch.rand(m, len(plan.group_bits), generator=g) * top).to(torch.int32)
        self.scale = torch.rand(m, len(plan.group_bits), generator=g) * 0.1
        self.weight_scale = torch.rand(plan.scale_rows, n, generator=g) * 0.1
        self.bias = None if self.bias_dtype is None else torch.randn(n, generator=g).to(self.bias_dtype)
        weights = (self.low.int(), self.high.int())
        self.sums = torch.stack(
            [weights[r.part][:, r.start : r.start + r.length].sum(1).int() for r in plan.runs]
        ).contiguous()
        self._lay_out()

    def _lay_out(self) -> None:
        """Codes in part order: runs padded to 32 columns, parts to 128 bytes (csrc/cuda/formats.h)."""
        used, spans = [0, 0], []
        for r in self.plan.runs:
            spans.append((r.part, r.group, r.scale_row, used[r.part], r.length, padded(r.length, RUN)))
            used[r.part] += padded(r.length, RUN)
        pitches = [padded(columns, PITCH) for columns in used]
        self.part_at, self.pitch = (0, pitches[0]), sum(pitches)
        self.spans = torch.tensor(spans, dtype=torch.int32)
        rows = aligned(torch.zeros(self.tokens, self.pitch, dtype=torch.uint8))
        for r, (part, _, _, at, length, _) in zip(self.plan.runs, spans, strict=True):
            columns = self.codes[:, self.plan.part_index(part)][:, r.start : r.start + r.length]
            rows[:, self.part_at[part] + at : self.part_at[part] + at + length] = columns
        self.rows = rows

    def integers(self) -> torch.Tensor:
        return reference.linear_integer(self.codes, self.zero, self.low, self.high, self.plan)

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        """reference.linear from the codes on."""
        y = torch.zeros(self.tokens, self.outputs)
        for index, (run, part) in enumerate(zip(self.plan.runs, self.integers(), strict=True)):
            y = y + part.float() * (self.scale[:, run.group : run.group + 1] * self.weight_scale[run.scale_row])
            assert index < len(self.plan.runs)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(dtype)

    def problem(self) -> Problem:
        """Packs the weight the first time."""
        p = Problem()
        p.spans, p.n_runs, p.low_bits = self.spans.data_ptr(), len(self.plan.runs), self.low_bits
        p.m, p.n, p.groups, p.pitch = self.tokens, self.outputs, len(self.plan.group_bits), self.pitch
        p.part_at = (ctypes.c_int64 * 2)(*self.part_at)
        self.low_stored = pack_int4(self.low) if self.low_bits == 4 else self.low.contiguous()
        p.low, p.high = self.low_stored.data_ptr(), self.high.data_ptr()
        p.low_row_bytes, p.high_row_bytes = self.low_stored.shape[1], self.high.shape[1]
        p.codes, p.x_scale, p.x_zero = self.rows.data_ptr(), self.scale.data_ptr(), self.zero.data_ptr()
        p.weight_scale, p.scale_rows = self.weight_scale.data_ptr(), self.plan.scale_rows
        p.weight_sum, p.splits, p.grid, p.raw_run = self.sums.data_ptr(), 1, 2, -1
        if self.bias is not None:
            p.bias, p.bias_type = self.bias.data_ptr(), FLOAT_TYPES[self.bias.dtype]
        if not hasattr(self, "packed"):
            self.packed = aligned(torch.zeros(emulation().resq_packed_bytes(ctypes.byref(p)), dtype=torch.uint8))
            p.packed = self.packed.data_ptr()
            emulation().resq_pack(ctypes.byref(p))
        p.packed = self.packed.data_ptr()
        return p

    def run(self, kernel: str, dtype: torch.dtype, splits: int = 1, raw_run: int = -1, seed: int = 1) -> torch.Tensor:
        """y [M, N] of the kernel's source. raw_run: that run's exact integers instead, as int32."""
        p = self.problem()
        out = torch.full((self.tokens, self.outputs), float("nan"), dtype=torch.float32 if raw_run >= 0 else dtype)
        p.out, p.out_type, p.splits, p.raw_run, p.seed = out.data_ptr(), FLOAT_TYPES[out.dtype], splits, raw_run, seed
        if raw_run >= 0:
            p.bias = None
        assert emulation().resq_gemm(kernel.encode(), ctypes.byref(p)) == 0, f"there is no kernel {kernel}"
        self.conflicts = int(p.conflicts)
        return out.view(torch.int32) if raw_run >= 0 else out


def aligned(x: torch.Tensor, multiple: int = 512) -> torch.Tensor:
    """A copy that begins at a multiple of ``multiple`` bytes, as on the device."""
    storage = torch.empty(x.numel() + multiple, dtype=x.dtype)
    skip = -storage.data_ptr() % multiple
    view = storage[skip : skip + x.numel()].view(x.shape)
    view.copy_(x)
    return view
