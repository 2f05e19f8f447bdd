"""``resq eval`` behind the command line: perplexity, tasks, or both."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline.bundled import MODEL_DIR
from offline.cli import app
from offline.evaluate.run import evaluate_model
from resq_vllm.errors import ResQError

TASK = str(Path(__file__).parent / "data" / "python_lines.yaml")


def test_tasks_come_in_place_of_perplexity() -> None:
    result = evaluate_model(str(MODEL_DIR), tasks=(TASK,), task_limit=3)
    assert result == {
        "model": str(MODEL_DIR),
        "engine": "reference",
        "naive_rtn": False,
        "tasks": {"python_lines": 1.0},
    }


def test_naming_a_data_set_gives_both(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "bundled", "--windows", "1", "--seqlen", "64", "--tasks", TASK, "--task-limit", "2"]
    app(["eval", str(MODEL_DIR), *flags], standalone_mode=False)
    out = capsys.readouterr().out
    assert "over 63 tokens (reference)" in out
    assert "python_lines 100.00% (reference)" in out


def test_a_bad_task_is_refused_before_any_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResQError, match=r"absent\.yaml"):
        evaluate_model(str(MODEL_DIR), dataset="bundled", tasks=("absent.yaml",))
    assert "perplexity" not in capsys.readouterr().err
