"""A CPU with AMX taken for one without."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.amx import FOLDER, hide_amx
from benchmarks.machine import machine

ASK = """
import torch.cpu, vllm.v1.attention.backends.cpu_attn as backend
from resq_vllm.ops import isa
print(torch.cpu._is_amx_tile_supported(), backend._get_attn_isa(torch.bfloat16, 32, 64, "auto"), isa())
"""


@pytest.mark.skipif("avx512_vnni" not in machine().flags, reason="this CPU has no AVX512-VNNI")
def test_every_kernel_of_a_child_process_is_chosen_without_amx() -> None:
    environment = dict(os.environ)
    environment.pop("RESQ_ISA", None)
    hide_amx(environment)
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, env=environment)
    supported, attention, isa = done.stdout.split()[-3:]
    assert supported == "False"
    assert attention != "amx"
    assert isa == "avx512_vnni"


def test_it_is_set_once_and_leaves_a_forced_isa() -> None:
    environment = {"PYTHONPATH": "/mine", "RESQ_ISA": "avx2"}
    hide_amx(environment)
    hide_amx(environment)
    assert environment["PYTHONPATH"] == os.pathsep.join([str(FOLDER), "/mine"])
    assert environment["RESQ_ISA"] == "avx2"
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
