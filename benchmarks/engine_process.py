"""A child process with an engine, which answers a pass over its cells whenever it is asked for one.

The parent writes a line to the child's input for every pass and finds the figures in a file, written whole; the child
ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

LOG_TAIL_LINES = 15
# vLLM's start and warm-up, and some slow minute of a shared machine.
PATIENCE_SECONDS = 3600.0
LOOK_SECONDS = 0.1
ENDINGS = ("spec.json", "answer.json", "log")


class EngineError(RuntimeError):
    """A contender cannot run here; the message says why, with the tail of its output where it was started."""


def answer_passes(asked: Iterable[object], one_pass: Callable[[], Mapping[str, Any]], answer_file: Path) -> None:
    """In the child: a pass for everything in `asked` (the lines of its input)."""
    for _ in asked:
        temporary = answer_file.with_name(answer_file.name + ".new")
        temporary.write_text(json.dumps(one_pass()))
        temporary.rename(answer_file)


class EngineProcess:
    """In the parent: the child that `command`, SPEC and ANSWER start. Ends with the `with` block."""

    def __init__(
        self, command: Sequence[str], spec: Mapping[str, Any], environment: Mapping[str, str], name: Path
    ) -> None:
        """`name`: of its files, without the endings that tell spec, answer and log apart."""
        spec_file, self._answer, self._log = (name.with_name(f"{name.name}.{end}") for end in ENDINGS)
        spec_file.write_text(json.dumps(spec))
        with self._log.open("wb") as output:
            # A group of its own, so that an interrupted benchmark leaves no engine behind.
            self._process = subprocess.Popen(
                [*command, str(spec_file), str(self._answer)],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(patience=0.0 if kind else PATIENCE_SECONDS)

    def close(self, patience: float = 0.0) -> None:
        """Let it end by itself for so many seconds, then kill it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def text(self) -> str:
        """What it has written to its output."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def one_pass(self) -> dict[str, Any]:
        """Ask for a pass and wait for its figures.

        Raises:
            EngineError: when the process ends instead, or takes too long.

        """
        self._answer.unlink(missing_ok=True)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: said below
        ends = time.monotonic() + PATIENCE_SECONDS
        while True:
            status = self._process.poll()
            if self._answer.exists():
                figures: dict[str, Any] = json.loads(self._answer.read_text())
                return figures
            if status is not None:
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                tail = "\n".join(self.text.splitlines()[-LOG_TAIL_LINES:])
                raise EngineError(f"its process ended with {how}; the last lines of its output are:\n{tail}")
            if time.monotonic() > ends:
                raise EngineError(f"its process was still running after {PATIENCE_SECONDS} s")
            time.sleep(LOOK_SECONDS)
