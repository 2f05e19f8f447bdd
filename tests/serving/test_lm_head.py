"""A 4-bit lm_head in vLLM: rows of the vocabulary on two ranks, low and high columns; test_lqer serves an 8-bit one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline.bundled import MODEL_DIR
from offline.evaluate import evaluate_perplexity
from tests.serving.support import resq

pytestmark = pytest.mark.serving


def test_served_perplexity_is_that_of_the_reference(tmp_path: Path) -> None:
    checkpoint, result = tmp_path / "lm4", tmp_path / "result.json"
    # To nearest and on few texts: how well it is rounded is not what this is about.
    short = ("--rtn", "--nsamples", "4", "--seqlen", "128", "--eval-windows", "0")
    resq("quantize", MODEL_DIR, "-o", checkpoint, "--lm-head-bits", "4", *short)
    reference = evaluate_perplexity(checkpoint, limit=8, progress=False).value
    options = ("--engine", "vllm", "--tp", "2", "--windows", "8", "--enforce-eager", "--json", result)
    log = resq("eval", checkpoint, *options)
    assert "; lm_head W4.50A8; KV cache" in log
    assert json.loads(result.read_text())["perplexity"] == pytest.approx(reference, rel=0.01)
