"""The server helper with small programs in place of `vllm serve`."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from benchmarks.server import ServerError, VLLMServer, free_port, parse_kv_tokens, tensor_parallel_size

HEALTHY = """
import http.server, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("model", sys.argv[1], "child", child.pid, flush=True)
print("INFO CPU KV cache size: 12,345 tokens, Maximum concurrency", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/health", "/metrics") else 404)
        self.end_headers()
        self.wfile.write(b"up 1")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_serves_until_the_block_ends_and_stops_children_too(tmp_path: Path) -> None:
    with VLLMServer("MODEL", "--flag", log=tmp_path / "log", command=program(HEALTHY)) as server:
        leader = server.pid
        words = server.log_text().split()
        child = int(words[words.index("child") + 1])
        assert words[words.index("model") + 1] == "MODEL"
        assert server.kv_tokens() == 12345
        assert server.metrics_text() == "up 1"
        assert leader is not None
        assert alive(leader)
        assert alive(child)
    assert gone_within(leader, 5)
    assert gone_within(child, 5)


def test_stops_when_the_block_raises(tmp_path: Path) -> None:
    server = VLLMServer("MODEL", log=tmp_path / "log", command=program(HEALTHY))
    leaders: list[int | None] = []

    def interrupted() -> None:
        with server:
            leaders.append(server.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (leader,) = leaders
    assert leader is not None
    assert gone_within(leader, 5)


def test_command_that_dies_at_once_is_a_sentence_with_the_log_tail(tmp_path: Path) -> None:
    dies = program("import sys; print('first line'); sys.exit('unknown quantization method')")
    server = VLLMServer("MODEL", log=tmp_path / "log", command=dies)
    with pytest.raises(ServerError) as caught:
        server.start()
    message = str(caught.value)
    assert message.startswith("The server of MODEL ended with exit status 1 before it was ready")
    assert message.endswith("unknown quantization method")
    assert server.pid is None


def test_silent_command_is_stopped_after_the_bound(tmp_path: Path) -> None:
    silent = program("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    server = VLLMServer("MODEL", log=tmp_path / "log", timeout=1.5, command=silent)
    with pytest.raises(ServerError, match=r"did not answer http://127\.0\.0\.1:\d+/health within 2 s"):
        server.start()
    assert gone_within(int(server.log_text()), 5)


def test_temporary_log_is_removed() -> None:
    with VLLMServer("MODEL", command=program(HEALTHY)) as server:
        assert server.log_path.exists()
    assert not server.log_path.exists()


def test_proxy_of_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with VLLMServer("MODEL", log=tmp_path / "log", command=program(HEALTHY)) as server:
        assert server.metrics_text() == "up 1"


def test_environment_of_the_caller_wins(tmp_path: Path) -> None:
    shows = program(
        "import os, sys; sys.exit(os.environ['VLLM_CPU_OMP_THREADS_BIND'] + os.environ['VLLM_NO_USAGE_STATS'])"
    )
    server = VLLMServer("MODEL", log=tmp_path / "log", env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, command=shows)
    with pytest.raises(ServerError, match="nobind1"):
        server.start()


def test_kv_tokens_before_the_log_line_is_a_sentence(tmp_path: Path) -> None:
    server = VLLMServer("MODEL", log=tmp_path / "log")
    with pytest.raises(ServerError, match="has not reported the size of its KV cache"):
        server.kv_tokens()


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("(EngineCore pid=7) INFO CPU KV cache size: 21,760 tokens, Max", 21760),
        ("GPU KV cache size: 96 tokens", 96),
        ("", None),
    ],
)
def test_parse_kv_tokens(line: str, tokens: int | None) -> None:
    assert parse_kv_tokens(f"one\n{line}\nthree") == tokens


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ((), 1),
        (("--tensor-parallel-size", "2"), 2),
        (("--tensor-parallel-size=4",), 4),
        (("--max-model-len", "512", "-tp", "2"), 2),
    ],
)
def test_tensor_parallel_size(flags: tuple[str, ...], ranks: int) -> None:
    assert tensor_parallel_size(flags) == ranks


def test_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
