"""csrc/ compiles for aarch64, where the portable kernels serve, by a cross compiler: zig's clang, with its own libc."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AARCH64 = 183  # e_machine
# torch's libraries here are x86-64's, so nothing is linked. -O1 takes 33 s of processor time; -O0 takes 91 s, as forced
# inlining leaves huge functions.
COMPILER = """#!/bin/sh
case " $* " in *" -shared "*) exit 0;; esac
exec {python} -m ziglang c++ -target aarch64-linux-gnu "$@" -O1 -Wno-unknown-warning-option
"""


def test_every_source_compiles_for_aarch64(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(python=sys.executable))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    objects = tmp_path / "objects"
    places = {"CC": str(compiler), "CXX": str(compiler), "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "cache")}
    folders = [f"--build-temp={objects}", f"--build-lib={tmp_path / 'library'}"]
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--force", *folders],
        cwd=ROOT,
        env={**os.environ, **places, "RESQ_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    machines = {}
    for path in objects.rglob("*.o"):
        machines[path.stem] = struct.unpack_from("<H", path.read_bytes(), 18)[0]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    assert machines == {source.stem: AARCH64 for source in sources}
