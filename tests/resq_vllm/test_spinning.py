"""Idle worker threads give their core back soon where vLLM's scheduler has none of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from resq_vllm import spinning
from resq_vllm.spinning import BINDING_VARIABLE, POLICY_VARIABLE, SPIN_VARIABLE, SPINS, takes_every_core

FOUR = {0, 1, 2, 3}


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing chosen, and what the function under test sets is taken back."""
    for name in (SPIN_VARIABLE, POLICY_VARIABLE, BINDING_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def every_core() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


@pytest.mark.parametrize("binding", ["0-3", "0,1,2,3", "0-1|2-3", "0,2-3,1,7", "nobind"])
def test_bindings_that_leave_no_core(binding: str) -> None:
    assert takes_every_core({BINDING_VARIABLE: binding}, FOUR)


@pytest.mark.parametrize("binding", ["auto", "0-2", "1,2,3", "0|1", "", "0-", "x", "3-0"])
def test_bindings_that_leave_one_or_are_no_binding(binding: str) -> None:
    assert not takes_every_core({BINDING_VARIABLE: binding}, FOUR)


def test_vllms_default_binding_keeps_a_core() -> None:
    assert not takes_every_core({}, FOUR)


def test_workers_of_all_cores_spin_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINDING_VARIABLE, every_core())
    spinning.shorten_spinning()
    assert os.environ[SPIN_VARIABLE] == str(SPINS)


def test_a_spare_core_leaves_spinning_alone() -> None:
    spinning.shorten_spinning()
    assert SPIN_VARIABLE not in os.environ


@pytest.mark.parametrize(("name", "value"), [(SPIN_VARIABLE, "7"), (POLICY_VARIABLE, "active")])
def test_a_users_choice_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(BINDING_VARIABLE, every_core())
    monkeypatch.setenv(name, value)
    spinning.shorten_spinning()
    assert os.environ[name] == value
    assert os.environ.get(SPIN_VARIABLE) == (value if name == SPIN_VARIABLE else None)


IDLE = """
import time, torch
torch.set_num_threads(2)
x = torch.zeros(1 << 20)
loop = lambda: x.add_(1)  # large enough for two threads
loop()
clocks = lambda: (time.process_time(), time.thread_time())
busy = 0.0
for _ in range(50):
    loop()
    all_before, own_before = clocks()
    time.sleep(0.02)
    all_after, own_after = clocks()
    busy += (all_after - all_before) - (own_after - own_before)
print(busy / 50)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="with one core there is one thread")
def test_libgomp_reads_the_variable() -> None:
    """Seconds that a second thread spins in a pause of 20 ms: next to none by this setting; otherwise all of it, or the
    share that other work on its core leaves it.
    """
    spun = {}
    for rounds in (SPINS, 100_000_000):
        environment = os.environ | {SPIN_VARIABLE: str(rounds)}
        command = [sys.executable, "-c", IDLE]
        spun[rounds] = float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert spun[SPINS] < 0.0016 < 0.005 < spun[100_000_000]
