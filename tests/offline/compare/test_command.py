"""``resq compare`` from checked options to the printed table, with an engine in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline.compare.command import run_compare
from offline.compare.options import CompareOptions, default_folder
from resq_vllm.errors import ResQError
from tests.offline.compare.fakes import FakeEngine


def test_prints_the_table_and_writes_folder_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, CompareOptions]] = []

    def opener(model: str, options: CompareOptions, output: Path) -> FakeEngine:
        assert output == tmp_path / "out"
        asked.append((model, options))
        return FakeEngine()

    options = CompareOptions.checked(model="stories", methods=("bf16", "resq"), seed=3)
    run_compare(options, opener, tmp_path / "out", tmp_path / "result.json")
    assert asked == [("stories", options)]
    captured = capsys.readouterr()
    assert "ResQ ★" in captured.out
    assert "[2/2] resq: perplexity 7.000" in captured.err
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["bf16", "resq"]
    assert (tmp_path / "out" / "compare.md").exists()


def test_a_failed_method_is_an_error_after_everything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine({"lqer": RuntimeError("broken")})
    with pytest.raises(ResQError, match="1 of 5 methods failed: lqer"):
        run_compare(CompareOptions(model="m"), lambda *_: engine, tmp_path / "out", tmp_path / "result.json")
    assert "QuaRot" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "result.json").read_text())["rows"]) == 4


def test_unknown_task_is_refused_before_the_engine_is_opened(tmp_path: Path) -> None:
    options = CompareOptions.checked(model="m", tasks=("absent.yaml",))
    with pytest.raises(ResQError, match=r"absent\.yaml"):
        run_compare(options, lambda *_: pytest.fail("opened"), tmp_path)


def test_folder_is_named_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "stories").mkdir()
    assert default_folder(str(tmp_path / "stories") + "/") == Path("compare-stories")
    assert default_folder("owner/name") == Path("compare-name")
