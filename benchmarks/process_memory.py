"""Resident memory of a process and all its children, shared pages counted once (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

PROC = Path("/proc")


def children(pid: int, proc: Path = PROC) -> list[int]:
    """`pid` and all its descendants that still run."""
    parents: dict[int, int] = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The name in parentheses may itself hold spaces and parentheses.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def proportional_bytes(pid: int, proc: Path = PROC, field: str = "Pss") -> int:
    """Proportional set size of one process, or (Pss_Anon) that of its anonymous memory; 0 when it has ended."""
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def resident_gib(pid: int, proc: Path = PROC) -> float:
    """GiB that `pid` and its descendants occupy."""
    return sum(proportional_bytes(member, proc) for member in children(pid, proc)) / 2**30


def own_gib(pid: int, proc: Path = PROC) -> float:
    """GiB of memory that `pid` and its descendants have written, without pages of files.

    Libraries' pages are divided among all processes that map them, so another vLLM that starts or ends beside a
    measurement moves the proportional sizes of an engine's processes by 50 MiB together.
    """
    return sum(proportional_bytes(member, proc, "Pss_Anon") for member in children(pid, proc)) / 2**30
