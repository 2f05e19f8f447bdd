"""Environment variables for vLLM processes."""

from __future__ import annotations

import os

import pytest

from benchmarks.environment import cpu_binding, vllm_environment


@pytest.mark.parametrize(
    ("cores", "ranks", "binding"),
    [
        ({0, 1}, 1, "0,1"),
        ({0, 1}, 2, "0|1"),
        ({2, 3, 5, 7}, 2, "2,3|5,7"),
        ({4}, 1, "4"),
        ({4}, 2, "auto"),
        (set(range(16)), 1, "auto"),
    ],
)
def test_few_cores_all_compute(monkeypatch: pytest.MonkeyPatch, cores: set[int], ranks: int, binding: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert cpu_binding(ranks) == binding


def test_loopback_joins_the_names_that_need_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    environment = vllm_environment()
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert environment["NO_PROXY"] == "127.0.0.1,localhost"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_binding_of_the_user_is_kept_and_extra_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert vllm_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert vllm_environment({"VLLM_CPU_OMP_THREADS_BIND": "nobind"})["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
