"""Other ways to start the server: vLLM's own KV cache, two ranks, an explicit method."""

from __future__ import annotations

import pytest

from benchmarks.client import connect
from benchmarks.server import VLLMServer
from offline.bundled import HELDOUT_TEXT
from tests.serving.support import counter, greedy, served_perplexity

pytestmark = pytest.mark.serving


def text() -> str:
    return HELDOUT_TEXT.read_text(encoding="utf-8")[20_000:21_200]


def test_packed_cache_holds_three_times_the_tokens(server: VLLMServer, bf16_cache_server: VLLMServer) -> None:
    ratio = server.kv_tokens() / bf16_cache_server.kv_tokens()
    assert ratio >= 2.8
    assert ratio == pytest.approx(256 / 84, rel=0.02)
    metric = [line for line in server.metrics_text().splitlines() if line.startswith("vllm:cache_config_info{")]
    assert len(metric) == 1
    assert 'cache_dtype="auto"' in metric[0]


def test_explicit_cache_dtype_opts_out(server: VLLMServer, bf16_cache_server: VLLMServer) -> None:
    log = bf16_cache_server.log_text()
    assert "ResQ: vLLM's own KV cache is used, because --kv-cache-dtype is bfloat16" in log
    assert "packed in" not in log
    # The same weights and activations: only the 4.5-bit cache differs.
    assert served_perplexity(server) == pytest.approx(served_perplexity(bf16_cache_server), rel=0.02)


def test_two_ranks_with_an_explicit_method(server: VLLMServer, two_rank_server: VLLMServer) -> None:
    log = two_rank_server.log_text()
    assert "tensor_parallel_size=2" in log
    assert log.count("ResQ: CPU kernels ") == 1
    assert two_rank_server.kv_tokens() == pytest.approx(2 * server.kv_tokens(), rel=0.01)
    # Both are off from float32 by what bf16 rounds (0.4 % of so many tokens), each in its own way.
    assert served_perplexity(two_rank_server) == pytest.approx(served_perplexity(server), rel=0.01)
    assert greedy(connect(two_rank_server.api_url), text()[:300]).strip()


def test_counters_move(two_rank_server: VLLMServer) -> None:
    before = counter(two_rank_server, "vllm:generation_tokens_total")
    greedy(connect(two_rank_server.api_url), "def add(a, b):", tokens=7)
    assert counter(two_rank_server, "vllm:generation_tokens_total") - before == 7
