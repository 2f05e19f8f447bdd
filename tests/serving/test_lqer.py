"""An L²QER checkpoint in vLLM: weight scales per column group, A and B, 8-bit lm_head, two ranks, vLLM's KV cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline.bundled import MODEL_DIR
from offline.evaluate import evaluate_perplexity
from tests.serving.support import resq

pytestmark = pytest.mark.serving


def test_served_perplexity_is_that_of_the_reference(tmp_path: Path) -> None:
    checkpoint, result = tmp_path / "l2qer", tmp_path / "result.json"
    short = ("--nsamples", "16", "--seqlen", "256", "--eval-windows", "0")
    resq("quantize", MODEL_DIR, "-o", checkpoint, "--method", "l2qer", "--lm-head-bits", "8", *short)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    site = config["sites"]["down"]
    assert (site["low_rank"], site["weight_group"], config["lm_head_bits"]) == (32, 96, 8)
    plain = evaluate_perplexity(MODEL_DIR, limit=12, progress=False).value
    reference = evaluate_perplexity(checkpoint, limit=12, progress=False).value
    options = ("--engine", "vllm", "--tp", "2", "--windows", "12", "--enforce-eager", "--json", result)
    log = resq("eval", checkpoint, *options)
    assert "lm_head W8A8" in log
    assert json.loads(result.read_text())["perplexity"] == pytest.approx(reference, rel=0.005)
    # Without A and B it is 1.37 times the plain one, with those of LQER 1.19 times.
    assert reference < 1.1 * plain
