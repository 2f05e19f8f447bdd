"""`python -m benchmarks.gpu_serve_child SPEC ANSWER`: one engine, all cells in turn, each written at once.

A cell has one cold pass over its prompts and HOT_PASSES hot ones. The cold one finds nothing in the prefix cache: time
to the first token, and prompt tokens a second. A hot one finds all but each prompt's last block there and generates at
once: time per output token with the whole batch decoding, undisturbed by prefill; reported are median and range.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scenarios import Cell, Scenario

# Kernels compile at their first use; more than one stream so that a batch is decoded, too.
WARM_UP = Cell(Scenario("warm-up", 200, 8), 4)
LOWEST_TOKEN, PROMPT_VOCABULARY = 4, 4096
HOT_PASSES = 3


def write_answer(path: Path, answer: dict[str, Any]) -> None:
    """Whole or not at all: the parent may end this process at any time."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(answer))
    temporary.rename(path)


class Engine:
    """vLLM with random weights."""

    def __init__(self, options: dict[str, Any], seed: int) -> None:
        from vllm import LLM

        self._llm = LLM(
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            disable_log_stats=False,
            **options,
        )
        self._seed = seed

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds, as vLLM counts them."""
        tokens = self._llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        if tokens is None:
            raise RuntimeError("vLLM does not say how many tokens its KV cache holds.")
        return int(tokens)

    def _generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Any]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        metrics = [output.metrics for output in outputs]
        if any(one is None or one.num_generation_tokens != tokens for one in metrics):
            raise RuntimeError(f"the engine did not generate the {tokens} tokens it was asked for.")
        return seconds, metrics

    def run(self, cell: Cell) -> dict[str, Any]:
        """All passes over a cell."""
        # Of the cell's own: the same prompts whichever cells come before.
        chosen = random.Random(f"{self._seed} {cell.key}")
        choices = range(LOWEST_TOKEN, PROMPT_VOCABULARY)
        prompts = [chosen.choices(choices, k=cell.scenario.prompt) for _ in range(cell.streams)]
        cold_seconds, cold = self._generate(prompts, 1)
        return {
            "prefill_tokens_s": cell.streams * cell.scenario.prompt / cold_seconds,
            "ttft_ms": 1e3 * statistics.median(one.first_token_latency for one in cold),
            **summary([self._hot(prompts, cell) for _ in range(HOT_PASSES)]),
        }

    def _hot(self, prompts: list[list[int]], cell: Cell) -> dict[str, float]:
        seconds, metrics = self._generate(prompts, cell.scenario.output)
        per_token = statistics.median(
            (one.last_token_ts - one.first_token_ts) / max(1, cell.scenario.output - 1) for one in metrics
        )
        return {
            "tpot_ms": 1e3 * per_token,
            "decode_tokens_s": cell.streams / per_token,
            "output_tokens_s": cell.streams * cell.scenario.output / seconds,
        }


def summary(passes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of every figure the median, and as NAME_range the least and the largest."""
    found: dict[str, Any] = {}
    for name in passes[0]:
        values = [one[name] for one in passes]
        found |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
    return found


def too_large(cell: Cell, kv_tokens: int) -> str | None:
    """Why the cell's requests cannot all be in the cache at once, as its second pass wants them; None if they can."""
    if cell.tokens <= kv_tokens:
        return None
    return f"needs {cell.tokens} tokens of KV cache, which holds {kv_tokens}"


def main(spec_file: Path, answer_file: Path) -> None:
    """ANSWER: {"kv_tokens", "start_seconds", "cells": {key: figures or {"reason": sentence}}, "running": key}.

    running: the cell that is being measured, absent at the end.
    """
    spec = json.loads(spec_file.read_text())
    started = time.perf_counter()
    engine = Engine(spec["options"], spec["seed"])
    engine.run(WARM_UP)
    answer: dict[str, Any] = {
        "kv_tokens": engine.kv_tokens,
        "start_seconds": round(time.perf_counter() - started, 1),
        "cells": {},
    }
    for name, data in spec["cells"].items():
        write_answer(answer_file, answer | {"running": name})
        cell = Cell.from_dict(data)
        reason = too_large(cell, engine.kv_tokens)
        answer["cells"][name] = {"reason": reason} if reason else engine.run(cell)
    write_answer(answer_file, answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
