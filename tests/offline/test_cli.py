"""The ``resq`` command: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offline import cli
from offline.bundled import MODEL_DIR
from resq_vllm import __version__


@pytest.fixture
def resq(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with these arguments; returns the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["resq", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return run


def test_version(resq: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert resq("--version") == 0
    assert __version__ in capsys.readouterr().out


def test_eval_writes_its_result(resq: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert resq("eval", str(MODEL_DIR), "--windows", "1", "--seqlen", "128", "--json", str(file)) == 0
    result = json.loads(file.read_text())
    assert result["tokens"] == 127
    assert result["engine"] == "reference"
    assert f"{result['perplexity']:.4f}" in capsys.readouterr().out


def test_naive_quantization_is_worse(resq: Callable[..., int], tmp_path: Path) -> None:
    values = []
    for extra in ([], ["--naive-rtn"]):
        file = tmp_path / "result.json"
        assert resq("eval", str(MODEL_DIR), "--windows", "2", "--seqlen", "256", "--json", str(file), *extra) == 0
        values.append(json.loads(file.read_text())["perplexity"])
    assert values[1] > 1.3 * values[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["eval", "MODEL", "--naive-rtn", "--engine", "vllm"], "--naive-rtn"),
        (["eval", "MODEL", "--seqlen", "1"], "seqlen"),
        (["eval", "MODEL", "--dataset", "absent.txt"], "absent.txt"),
        (["eval", "MODEL", "--windows", "1", "--seqlen", "64", "--json", "/proc/nowhere/file.json"], "/proc/nowhere"),
        (["inspect", "MODEL"], "quantiz"),
        (["inspect", "absent-folder"], "absent-folder"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str], word: str, resq: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resq(*[str(MODEL_DIR) if a == "MODEL" else a for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resq: ")]
    assert len(lines) == 1
    assert word in lines[0]


@pytest.mark.parametrize("arguments", [["quantize"], ["eval", "x", "--engine", "none"], ["nonsense"]])
def test_usage_errors_exit_with_2(arguments: list[str], resq: Callable[..., int]) -> None:
    assert resq(*arguments) == 2
