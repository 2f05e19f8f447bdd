"""Resident memory of a process and its children."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.process_memory import children, own_gib, proportional_bytes, resident_gib


def process(proc: Path, pid: int, parent: int, kib: int, name: str = "python") -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0\n")
    (folder / "smaps_rollup").write_text(
        f"000-fff ---p 0 00:00 0 [rollup]\nRss: 99999 kB\nPss:    {kib} kB\nPss_Dirty: 1 kB\nPss_Anon: {kib // 4} kB\n"
    )


def test_children_of_children_count_and_strangers_do_not(tmp_path: Path) -> None:
    process(tmp_path, 10, 1, 1024)
    process(tmp_path, 11, 10, 2048, name="a) b (c")
    process(tmp_path, 12, 11, 1024)
    process(tmp_path, 13, 1, 2**20)
    assert sorted(children(10, tmp_path)) == [10, 11, 12]
    assert resident_gib(10, tmp_path) == 4 / 1024
    assert own_gib(10, tmp_path) == 1 / 1024


def test_process_that_has_ended(tmp_path: Path) -> None:
    assert proportional_bytes(99, tmp_path) == 0


def test_this_process_and_its_child_are_found() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in children(os.getpid())
        assert resident_gib(os.getpid()) > own_gib(os.getpid()) > 0.01
