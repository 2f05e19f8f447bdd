"""A real `vllm serve` process on 127.0.0.1, started and always stopped by a context manager."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.environment import vllm_environment

LOG_TAIL_LINES = 25
POLL_SECONDS = 0.25
STOP_SECONDS = 20.0
LEFTOVER_SECONDS = 3.0

_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
# The server is on the loopback interface: a proxy named in the environment must not be asked for it.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server died or did not become ready in time; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def parse_kv_tokens(log_text: str) -> int | None:
    """KV-cache capacity in tokens from vLLM's log line "... KV cache size: N tokens", None without one."""
    match = _KV_TOKENS.search(log_text)
    return int(match.group(1).replace(",", "")) if match else None


def tensor_parallel_size(flags: Sequence[str]) -> int:
    """Number of ranks that the flags of `vllm serve` ask for."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name in ("--tensor-parallel-size", "-tp"):
            return int(value)
    return 1


class VLLMServer:
    """`with VLLMServer(model, "--max-model-len", "512") as server:` serves `model` until the block ends.

    Args:
        model: checkpoint folder or model name given to `vllm serve`.
        flags: further command-line flags of `vllm serve`.
        log: file that receives stdout and stderr; a temporary file, removed at the end, when None.
        env: environment variables on top of `benchmarks.environment.vllm_environment()`.
        timeout: seconds until /health must answer.
        command: the serving command in front of the model (another program in tests of this class).

    Raises:
        ServerError: on entering, when the process exits or stays silent for `timeout` seconds.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *flags: str,
        log: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 600.0,
        command: Sequence[str] = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"),
    ) -> None:
        self.model = os.fspath(model)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.timeout = timeout
        self._command = [*command, self.model, "--host", "127.0.0.1", "--port", str(self.port), *flags]
        self._environment = vllm_environment(env, tensor_parallel_size(flags))
        self._temporary_log = log is None
        if log is None:
            handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
            os.close(handle)
            log = name
        self.log_path = Path(log)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def api_url(self) -> str:
        """Base URL of the OpenAI-compatible API."""
        return f"{self.url}/v1"

    @property
    def pid(self) -> int | None:
        """Process id of the API server, which leads the process group of all its children."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._temporary_log:
            self.log_path.unlink(missing_ok=True)

    def start(self) -> None:
        """Start the process and return once /health answers; a failed start leaves nothing running."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            # A session of its own makes a process group: the engine's children are stopped with it.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self.stop()
            raise

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            code = process.poll()
            if code is not None:
                raise ServerError(self._failure(f"ended with exit status {code} before it was ready"))
            if self._healthy():
                return
            time.sleep(POLL_SECONDS)
        raise ServerError(self._failure(f"did not answer {self.url}/health within {self.timeout:.0f} s"))

    def _healthy(self) -> bool:
        try:
            with _OPENER.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _failure(self, what: str) -> str:
        tail = "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])
        return f"The server of {self.model} {what}; the last lines of its log are:\n{tail}"

    def stop(self) -> None:
        """Stop the server and every process of its group; harmless when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            # Python's resource tracker outlives the others and removes their shared memory: let it finish.
            deadline = time.monotonic() + LEFTOVER_SECONDS
            while _signal_group(process.pid, 0) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 5)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    def log_text(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def metrics_text(self) -> str:
        """The Prometheus metrics of the running server."""
        with _OPENER.open(f"{self.url}/metrics", timeout=30) as answer:
            text: str = answer.read().decode("utf-8")
            return text

    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache, as vLLM itself reports at start.

        Raises:
            ServerError: when the log has no such line (the server has not finished starting).
        """
        tokens = parse_kv_tokens(self.log_text())
        if tokens is None:
            raise ServerError(self._failure("has not reported the size of its KV cache"))
        return tokens


def _signal_group(group: int, number: int) -> bool:
    """Send a signal (0: none) to a process group; whether it still has a process."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
