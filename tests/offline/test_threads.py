"""Idle threads of the command give their cores back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from offline.threads import SPINS, spin_briefly
from resq_vllm.spinning import POLICY_VARIABLE, SPIN_VARIABLE


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, str(SPINS)), ({SPIN_VARIABLE: "7"}, "7"), ({POLICY_VARIABLE: "active"}, None)],
)
def test_a_users_own_choice_stays(given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    spin_briefly()
    assert environment.get(SPIN_VARIABLE) == expected


def test_the_command_says_so_before_libgomp_is_loaded() -> None:
    code = (
        "import os, sys, offline.cli as cli; assert 'torch' not in sys.modules; sys.argv = ['resq', '--version']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        f"print(os.environ[{SPIN_VARIABLE!r}], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in (SPIN_VARIABLE, POLICY_VARIABLE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == f"{SPINS} False"
