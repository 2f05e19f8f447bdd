"""Children with a time limit."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.gpu_serve_process import reason_in, run_limited


def test_success_has_no_reason(tmp_path: Path) -> None:
    assert run_limited([sys.executable, "-c", "print(1)"], os.environ, tmp_path / "a" / "log", 60) is None
    assert (tmp_path / "a" / "log").read_text() == "1\n"


def test_failure_is_the_line_that_names_the_error(tmp_path: Path) -> None:
    code = "import sys; print('ValueError: no such thing'); print('bye'); sys.exit(3)"
    reason = run_limited([sys.executable, "-c", code], os.environ, tmp_path / "log", 60)
    assert reason == "ended with exit status 3: ValueError: no such thing"


def test_signal_is_named(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    reason = run_limited([sys.executable, "-c", code], os.environ, tmp_path / "log", 60)
    assert reason == "ended with signal SIGSEGV: it said nothing"


def test_time_limit_ends_grandchildren_too(tmp_path: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    started = time.monotonic()
    reason = run_limited([sys.executable, "-c", code], os.environ, tmp_path / "log", 2)
    assert reason == "stopped after 2 s"
    assert time.monotonic() - started < 30
    stat = Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_log_without_an_error_gives_its_last_line() -> None:
    assert reason_in("one\ntwo\n\n") == "two"
    assert reason_in("ValidationError: 1 validation error for X\n field\n  wrong\n at\n").endswith("for X field wrong")
    assert reason_in("") == "it said nothing"
    assert len(reason_in("x" * 5000)) == 400
