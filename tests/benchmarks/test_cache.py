"""Results kept between runs of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cache import ResultCache, fingerprint, sources


def test_computes_once_per_fingerprint_also_across_runs(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> float:
        calls.append(1)
        return float(len(calls))

    path = tmp_path / "demo" / "cache.json"
    assert ResultCache(path).get("ppl", "k1", compute) == 1.0
    assert ResultCache(path).get("ppl", "k1", compute) == 1.0
    assert ResultCache(path).get("ppl", "k2", compute) == 2.0
    assert ResultCache(path).get("other", "k2", compute) == 3.0


def test_failed_computation_keeps_nothing(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "cache.json")

    def fail() -> float:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        cache.get("ppl", "k", fail)
    assert not cache.valid("ppl", "k")


def test_forgotten_result_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    ResultCache(path).get("quantize", "k", lambda: 1.0)
    ResultCache(path).forget("quantize")
    assert not ResultCache(path).valid("quantize", "k")


def test_damaged_file_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text('{"ppl": ')
    assert ResultCache(path).get("ppl", "k", lambda: 5.0) == 5.0


def test_fingerprint_follows_contents_and_facts_but_not_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.cpp"
    first.write_text("a")
    second.write_text("b")
    key = fingerprint([first, second], {"torch": "2"})
    assert fingerprint([second, first], {"torch": "2"}) == key
    assert fingerprint([first, second], {"torch": "3"}) != key
    second.write_text("c")
    assert fingerprint([first, second], {"torch": "2"}) != key


def test_compiled_files_are_no_sources(tmp_path: Path) -> None:
    for name in ("a.py", "k/b.cpp", "k/_C.abi3.so", "__pycache__/a.pyc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert sorted(path.name for path in sources(tmp_path)) == ["a.py", "b.cpp"]
