"""Machine facts."""

from __future__ import annotations

import json
import os

import torch

from benchmarks.machine import machine, parse_cpuinfo

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: another
flags\t\t: fpu
"""


def test_first_processor_and_relevant_flags_only() -> None:
    name, flags = parse_cpuinfo(CPUINFO)
    assert name == "Intel(R) Xeon(R) Processor"
    assert flags == ("avx2", "avx512f", "avx512_vnni", "amx_int8")


def test_machine_without_cpuinfo_has_a_name_and_no_flags() -> None:
    name, flags = parse_cpuinfo("")
    assert name
    assert flags == ()


def test_facts_are_json_and_true() -> None:
    facts = json.loads(json.dumps(machine().to_dict()))
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["memory_gib"] > 0
