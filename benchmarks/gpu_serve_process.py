"""A child process with a time limit of its own, whose failure is a sentence and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Words that begin the line which says what went wrong, the last of them in a log.
_ERRORS = ("Error", "Exception", "error:", "AssertionError")
_SENTENCE_CHARACTERS = 400
_STOPPED = "stopped after "


def stopped(seconds: float) -> str:
    """The reason of a process that was ended because its time was up."""
    return f"{_STOPPED}{seconds:.0f} s"


def ran_out(reason: str) -> bool:
    """Whether a reason says so: another try, or a larger limit, may end otherwise."""
    return reason.startswith(_STOPPED)


def reason_in(log: str) -> str:
    """The last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [number for number, line in enumerate(lines) if any(word in line for word in _ERRORS)]
    if not named:
        return (lines or ["it said nothing"])[-1][:_SENTENCE_CHARACTERS]
    last = named[-1]
    # pydantic names the field and what is wrong with it on the lines that follow.
    more = 2 if "validation error" in lines[last] else 0
    return " ".join(lines[last : last + 1 + more])[:_SENTENCE_CHARACTERS]


def run_limited(command: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> str | None:
    """Run a command; None when it ended well, or one sentence why it did not.

    Its output goes to `log`. After `seconds` it is ended with every process it started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # The engine's workers are in the group, also those that outlive their parent.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return None
    if status is None:
        return stopped(seconds)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"ended with {how}: {reason_in(log.read_text(encoding='utf-8', errors='replace'))}"
