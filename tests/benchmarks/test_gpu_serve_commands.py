"""The commands of the stage "serve": what they are given, what is kept of their answers, what a failure leaves."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from benchmarks import gpu_serve_commands as commands
from benchmarks import gpu_serve_contenders
from benchmarks.dummy_model import SHAPES
from benchmarks.gpu_serve_answers import Answers
from benchmarks.gpu_serve_contenders import CONTENDERS, cell
from benchmarks.gpu_serve_engines import Run
from benchmarks.server import ServerError

MEASURED = cell(3, 64, 8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["small"], num_hidden_layers=1))
    monkeypatch.setattr(gpu_serve_contenders, "VOCABULARY", 4096)
    memory = {"gpu_memory_utilization": 0.9}
    return Run("tiny", (), tmp_path, 100, time.monotonic() + 900, memory, Answers(tmp_path / "kept"))


def test_flags_are_those_of_the_engine() -> None:
    words = commands.flags(CONTENDERS["int4-kv"].options, MEASURED, {"gpu_memory_utilization": 0.9})
    graphs = words.index("--cudagraph-capture-sizes")
    assert words[graphs + 1 :] == ["1", "2", "4", "8", "16", "32", "64", "128", "256"]
    pairs = dict(zip(words[3:graphs:2], words[4:graphs:2], strict=True))
    assert words[:3] == ["--load-format", "dummy", "--no-enable-prefix-caching"]
    assert pairs == {
        "--max-model-len": "136",
        "--max-num-seqs": "3",
        "--gpu-memory-utilization": "0.9",
        "--kv-cache-dtype": "int4_per_token_head",
    }


def test_vllm_accepts_the_flags_of_every_contender(run: Run) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for contender in CONTENDERS.values():
        parsed = parser.parse_args(["--model", "m", *commands.flags(contender.options, MEASURED, run.memory)])
        assert parsed.max_num_seqs == 3
        assert parsed.cudagraph_capture_sizes[-1] == 256
        assert parsed.load_format == "dummy"


def test_commands_ask_for_the_cell(tmp_path: Path) -> None:
    served = commands.serve_command("http://127.0.0.1:1", tmp_path, MEASURED, tmp_path / "a.json")
    thrown = commands.throughput_command(tmp_path, ["--x"], MEASURED, tmp_path / "b.json")
    for command in (served, thrown):
        given = {name: command[command.index(name) + 1] for name in ("--random-input-len", "--num-prompts")}
        assert given == {"--random-input-len": "64", "--num-prompts": "3"}
    assert served[served.index("--result-filename") + 1] == "a.json"
    assert thrown[-1] == "--x"


class Clock:
    """time.monotonic() of the commands, which pass the time at once."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


class Server:
    """Stands in for VLLMServer."""

    url, api_url, error = "http://127.0.0.1:9", "http://127.0.0.1:9/v1", ""
    seconds_to_start = 0.0

    def __init__(self, model: Path, *flags: str, log: Path, timeout: float) -> None:
        assert (model / "config.json").exists()
        self.timeout = timeout

    def __enter__(self) -> Self:
        Clock.now += self.seconds_to_start
        if self.error:
            raise ServerError(self.error)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def kv_tokens(self) -> int:
        return 4711


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(commands, "VLLMServer", Server)
    monkeypatch.setattr(commands, "connect", lambda url, timeout: None)
    monkeypatch.setattr(commands, "complete", lambda client, prompt, tokens: "text")
    monkeypatch.setattr(Server, "error", "")
    monkeypatch.setattr(Server, "seconds_to_start", 0.0)
    monkeypatch.setattr(commands, "time", Clock)
    monkeypatch.setattr(Clock, "now", 0.0)
    return Server


def answering(figures: dict[str, float] | None) -> Any:
    def run_limited(command: list[str], environment: Any, log: Path, seconds: float) -> str | None:
        if figures is None:
            return "stopped after 9 s"
        flag = "--output-json" if "--output-json" in command else "--result-filename"
        name = Path(command[command.index(flag) + 1])
        folder = Path(command[command.index("--result-dir") + 1]) if "--result-dir" in command else Path()
        (folder / name).write_text(json.dumps(figures))
        return None

    return run_limited


def test_served_contender_is_a_row_of_figures(run: Run, server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"output_throughput": 123.456789, "median_ttft_ms": 5.0, "median_tpot_ms": 2.0, "unknown": 1.0}
    monkeypatch.setattr(commands, "run_limited", answering(figures))
    assert commands.serve("resq", run, MEASURED) == {
        "command": "vllm serve, vllm bench serve",
        "contender": "resq",
        "cell": "3x64",
        "kv_tokens": 4711,
        "openai_client": True,
        "output_throughput": 123.5,
        "median_ttft_ms": 5.0,
        "median_tpot_ms": 2.0,
    }


def test_server_that_does_not_start_is_a_row_with_its_reason(
    run: Run, server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "error", "The server ended; its log:\nValueError: no such kernel\nbye")
    row = commands.serve("w4a16", run, MEASURED)
    assert row["reason"] == "ValueError: no such kernel"


def test_throughput_is_a_row_of_figures_or_a_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run_limited", answering({"tokens_per_second": 10.0, "elapsed_time": 2.0}))
    row = commands.throughput("bf16", run, MEASURED)
    assert (row["tokens_per_second"], row["elapsed_time"]) == (10.0, 2.0)
    monkeypatch.setattr(commands, "run_limited", answering(None))
    assert commands.throughput("bf16", run, MEASURED)["reason"] == "stopped after 9 s"


def test_server_and_bench_share_one_limit(run: Run, server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def run_limited(command: list[str], environment: Any, log: Path, seconds: float) -> str | None:
        given.append(seconds)
        return "stopped after 5 s"

    monkeypatch.setattr(commands, "run_limited", run_limited)
    monkeypatch.setattr(server, "seconds_to_start", 60.0)
    assert commands.serve("resq", run, MEASURED)["reason"] == "stopped after 5 s"
    # Of 100 s: 60 for the start, and 25 are left for the end.
    assert given == [100 - 60 - 25]


def test_server_that_takes_too_long_is_stopped_not_wrong(
    run: Run, server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "seconds_to_start", 75.0)
    monkeypatch.setattr(server, "error", "did not answer; its log:\nKeyError: harmless")
    assert commands.serve("resq", run, MEASURED)["reason"] == "stopped after 100 s"


class Commands:
    """In place of both commands; which ran, and how each ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **reasons: str) -> None:
        self.called: list[str] = []
        self.reasons = reasons
        monkeypatch.setattr(commands, "serve", lambda name, run: self.row("serve", name))
        monkeypatch.setattr(commands, "throughput", lambda name, run: self.row("throughput", name))

    def row(self, command: str, name: str) -> dict[str, Any]:
        self.called.append(f"{name} {command}")
        row = {"command": commands.TITLES[command], "contender": name}
        return row | ({"reason": self.reasons[command]} if command in self.reasons else {})


def silent(line: str) -> None:
    """Nobody reads along."""


def test_stage_goes_on_where_it_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = "ended with exit status 1: no kernel"
    first = Commands(monkeypatch, serve="stopped after 100 s", throughput=failed)
    assert not commands.run_commands(["bf16"], run, silent)
    # A failure stays; what ran out of time is measured again, by another process as well.
    second = Commands(monkeypatch)
    later = replace(run, answers=Answers(run.work / "kept"))
    assert commands.run_commands(["bf16", "resq"], later, silent)
    assert first.called == ["bf16 serve", "bf16 throughput"]
    assert second.called == ["bf16 serve", "resq serve", "resq throughput"]
    rows = commands.command_rows(["fp8-w8a8"], later.answers)
    found = [(row["contender"], row["command"], row.get("reason")) for row in rows]
    served, thrown = commands.TITLES.values()
    assert found == [
        ("bf16", served, None),
        ("bf16", thrown, failed),
        ("resq", served, None),
        ("resq", thrown, None),
        ("fp8-w8a8", served, "not measured yet"),
        ("fp8-w8a8", thrown, "not measured yet"),
    ]


def test_without_a_full_limit_no_command_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    late = Commands(monkeypatch)
    said: list[str] = []
    assert not commands.run_commands(["bf16"], replace(run, deadline=time.monotonic() + 99.5), said.append)
    assert not late.called
    assert said == [
        "not finished: bf16 serve, bf16 throughput (99 s left, a command's limit is 100 s); call the stage again"
    ]
