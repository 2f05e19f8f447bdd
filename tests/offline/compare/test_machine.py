"""Facts about the machine."""

from __future__ import annotations

import importlib.metadata
import json

from offline.compare.machine import machine, processor


def test_processor_is_read_from_cpuinfo() -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: avx2\n\nmodel name\t: Other\n"
    assert processor(text) == "Some CPU @ 2 GHz"
    assert processor("").strip() == processor("")


def test_facts_are_json_and_name_the_versions() -> None:
    facts = json.loads(json.dumps(machine()))
    assert facts["cores"] >= 1
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
