"""The stage "correctness": what is kept of its steps, what is compared, and what a lack of time leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_serve_correctness as correctness
from benchmarks.gpu_serve_answers import Answers
from benchmarks.gpu_serve_correctness import check

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"eager": {"enforce_eager": True}, "graphs": {}},
    "compiled": {"none": {}, "full": {}},
}
STEPS = (
    "greedy eager",
    "greedy graphs",
    "greedy none",
    "greedy full",
    "perplexity resq vllm",
    "perplexity resq reference",
    "perplexity bf16 vllm",
    "perplexity bf16 reference",
)


class Machine:
    """In place of processes, on a machine where each takes `seconds`; `ends`: reasons by the name of a step's log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.out, self.work = root / "out", root / "work"
        self.called: list[str] = []
        self.ends: dict[str, str] = {}
        self.perplexity = {"vllm": 10.01, "reference": 10.0}
        self.tokens: dict[str, list[list[int]]] = {}
        self.now, self.seconds = 0.0, 10.0
        monkeypatch.setattr(correctness, "run_limited", self.run)
        monkeypatch.setattr(correctness, "time", self)

    def monotonic(self) -> float:
        return self.now

    def run(self, command: list[str], environment: Any, log: Path, seconds: float) -> str | None:
        name = log.stem
        self.called.append(name.replace("-", " "))
        self.now += self.seconds
        if name in self.ends:
            return self.ends[name]
        if name == "quantize":
            made = Path(command[command.index("-o") + 1])
            made.mkdir(parents=True)
            (made / "model.safetensors").write_bytes(b"weights")
            (made / "config.json").write_text("{}")
            assert command[-1] == "--resume"
        elif name.startswith("greedy"):
            found = self.tokens.get(name.removeprefix("greedy-"), [[1, 2], [3, 4]])
            Path(command[-1]).write_text(json.dumps(found))
        else:
            engine = command[command.index("--engine") + 1]
            Path(command[command.index("--json") + 1]).write_text(json.dumps({"perplexity": self.perplexity[engine]}))
        return None

    def check(self, seconds: float = 1e6, checkpoint: Path | None = None) -> dict[str, Any]:
        """A call of the stage with so many seconds; only `out` remains of earlier ones."""
        self.called.clear()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        answers, archive = Answers(self.out / "answers.json"), self.out / "checkpoint.tar.gz"
        return check(self.work, archive, answers, checkpoint, 20, self.now + seconds, {}, lambda line: None, MODES)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_all_checks_hold(machine: Machine) -> None:
    found = machine.check()
    assert machine.called == ["quantize", *STEPS]
    assert (found["failures"], found["unfinished"]) == ([], [])
    assert [(row["check"], row["ok"]) for row in found["rows"]] == [("greedy tokens", True)] * 2 + [
        ("perplexity", True)
    ] * 2


def test_every_call_adds_to_the_last_with_nothing_but_its_output_folder(machine: Machine) -> None:
    # Steps take 10 s and may take 20, so that three of them start in 40 s; quantization may take 40.
    done: list[str] = []
    for _ in range(8):
        found = machine.check(40)
        done += machine.called
        if not found["unfinished"]:
            break
    assert done == ["quantize", *STEPS]
    assert len(found["rows"]) == 4
    assert found["failures"] == []


def test_nothing_starts_without_its_full_limit(machine: Machine) -> None:
    found = machine.check(39)
    assert machine.called == []
    assert found["unfinished"] == ["quantize"]


def test_what_ran_out_of_time_is_tried_again_and_what_failed_is_not(machine: Machine) -> None:
    machine.ends = {"greedy-graphs": "stopped after 20 s", "greedy-none": "ended with exit status 1: no kernel"}
    found = machine.check()
    assert found["unfinished"] == ["greedy graphs"]
    failure = "greedy none: ended with exit status 1: no kernel"
    assert found["failures"] == [failure]
    machine.ends = {}
    found = machine.check()
    assert machine.called == ["greedy graphs"]
    assert (found["failures"], found["unfinished"]) == ([failure], [])
    # Without the first engine of an arithmetic there is nothing to compare the second with.
    assert [row["engine"] for row in found["rows"] if row["check"] == "greedy tokens"] == ["graphs"]


def test_quantization_that_was_stopped_goes_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(command: list[str], environment: Any, log: Path, seconds: float) -> str | None:
        (machine.work / "checkpoint.resq-work").mkdir()
        (machine.work / "checkpoint.resq-work" / "layer0").write_text("half")
        return "stopped after 40 s"

    with monkeypatch.context() as stopped:
        stopped.setattr(correctness, "run_limited", begin)
        assert machine.check()["unfinished"] == ["quantize"]
    assert machine.check()["unfinished"] == []
    assert (machine.work / "checkpoint.resq-work" / "layer0").read_text() == "half"


def test_differences_are_failures(machine: Machine) -> None:
    machine.tokens["graphs"] = [[1, 2], [3, 5]]
    machine.perplexity["vllm"] = 10.2
    found = machine.check()
    assert found["failures"] == [
        "greedy tokens: graphs gives 3 of 4 as eager",
        "perplexity of resq: vLLM's is off by 2.00%",
        "perplexity of bf16: vLLM's is off by 2.00%",
    ]
    assert [row["ok"] for row in found["rows"]] == [False, True, False, False]


def test_answers_of_another_checkpoint_do_not_count(machine: Machine, tmp_path: Path) -> None:
    machine.check()
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    (other / "config.json").write_text("{}")
    assert machine.check(checkpoint=other)["unfinished"] == []
    assert machine.called == list(STEPS)
    machine.check(checkpoint=other)
    assert machine.called == []
