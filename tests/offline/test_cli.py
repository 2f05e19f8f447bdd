"""The ``resq`` command: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offline import cli
from offline.bundled import MODEL_DIR
from offline.compare.rows import CompareResult
from resq_vllm import __version__
from tests.offline.pipeline.conftest import tiny_llama


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
        (["compare", "MODEL", "--methods", "bf16,awq"], "--methods: awq unknown; the methods are bf16, rtn, gptq"),
        (["compare", "MODEL", "--ablations", "no-uz"], "--ablations: no-uz unknown"),
        (["compare", "MODEL", "--dataset", "absent.txt"], "absent.txt"),
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


def test_compare_measures_every_method_named(
    resq: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(tmp_path / "model")
    result = tmp_path / "result.json"
    quick = ["--nsamples", "4", "--seqlen", "64", "--windows", "4", "-o", str(tmp_path / "out"), "--json", str(result)]
    methods = ["--methods", "bf16,rtn,resq", "--ablations", "no-ua"]
    assert resq("compare", str(model), *methods, *quick) == 0
    found = CompareResult.model_validate_json(result.read_text())
    assert [row.method for row in found.rows] == ["bf16", "rtn", "resq", "resq-no-ua"]
    assert all(row.tokens == 4 * 63 for row in found.rows)
    assert found.calibration["text"] == "bundled"
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert resq("compare", str(model), *methods, *quick) == 0
    assert "(measured before)" in capsys.readouterr().err


def test_local_text_is_not_calibrated_on(resq: Callable[..., int], tmp_path: Path) -> None:
    """Without --calibration a file is for measuring only: the model writes its calibration text itself."""
    model, text, result = tiny_llama(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    quick = ["--nsamples", "8", "--seqlen", "64", "-o", str(tmp_path / "out"), "--json", str(result)]
    assert resq("compare", str(model), "--dataset", str(text), "--methods", "bf16,gptq", *quick) == 0
    assert json.loads(result.read_text())["calibration"]["text"] == "self"
    assert (tmp_path / "out" / "calibration.json").exists()
