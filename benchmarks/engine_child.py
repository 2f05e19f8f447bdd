"""`python -m benchmarks.engine_child SPEC ANSWER`: a process with one vLLM engine, which runs all cells.

A start of vLLM takes longer than most cells, so one engine serves them all. It is vLLM's own `LLM` class, which is what
`vllm bench throughput` measures; the times of every request are the engine's own metrics.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.engine_process import answer_passes
from benchmarks.process_memory import own_gib, resident_gib
from benchmarks.scenarios import Cell, Measured
from resq_vllm.memory import release_freed


def _release_freed(worker: object) -> None:
    """In vLLM's worker: what a batch of prompts needed and freed is no weights, but stays in the process."""
    release_freed()


class Engine:
    """An engine with random weights, as benchmarks.engine_contenders.engine_spec describes it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        # For loaded_gib alone, whose function goes to the worker.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        from vllm import LLM

        for module in spec["imports"]:
            importlib.import_module(module)
        self._vocabulary = spec["vocabulary"]
        self._random = random.Random(spec["seed"])
        self._llm = LLM(
            model=spec["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=spec["max_model_len"],
            max_num_seqs=spec["max_num_seqs"],
            kv_cache_memory_bytes=spec["kv_cache_bytes"],
            # Random prompts would hardly hit, but a benchmark should not depend on it.
            enable_prefix_caching=False,
            disable_log_stats=False,
            **spec["options"],
        )
        # As vLLM's server does. A full collection of this process's 770,000 objects takes 0.4 s alone, 1.4 s beside a
        # busy worker, and would fall into one contender's cell and not into another's.
        gc.collect()
        gc.freeze()

    def _prompt(self, tokens: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": self._random.choices(range(4, self._vocabulary), k=tokens)}

    def _generate(self, cell: Cell, requests: int) -> tuple[list[float], list[float]]:
        from vllm import SamplingParams

        scenario = cell.scenario
        sampling = SamplingParams(temperature=0.0, max_tokens=scenario.output, ignore_eos=True, detokenize=False)
        prompts = [self._prompt(scenario.prompt) for _ in range(requests)]
        first, between = [], []
        for output in self._llm.generate(prompts, sampling, use_tqdm=False):
            metrics = output.metrics
            if metrics is None or metrics.num_generation_tokens != scenario.output:
                raise RuntimeError(f"the engine did not generate the {scenario.output} tokens it was asked for.")
            first.append(metrics.first_token_latency)
            between.append((metrics.last_token_ts - metrics.first_token_ts) / max(1, scenario.output - 1))
        return first, between

    def loaded_gib(self) -> float:
        """GiB that this process and vLLM's have written, freed memory given back."""
        self._llm.collective_rpc(_release_freed)
        return own_gib(os.getpid())

    def run(self, cell: Cell) -> Measured:
        """One pass over a cell."""
        first: list[float] = []
        between: list[float] = []
        started = time.perf_counter()
        lots = [cell.streams] if cell.streams > 1 else [1] * cell.requests
        for lot in lots:
            times = self._generate(cell, lot)
            first += times[0]
            between += times[1]
        return Measured(time.perf_counter() - started, tuple(first), tuple(between))


def main(spec_file: Path, answer_file: Path, asked: Iterable[object] = (None,)) -> None:
    """Run the cells of the spec, once for each of `asked`, and write what was measured: {"cells": {key: figures},
    "loaded_gib", "rss_gib"}.
    """
    spec = json.loads(spec_file.read_text())
    engine = Engine(spec)
    engine.run(Cell.from_dict(spec["warm_up"]))
    loaded = engine.loaded_gib()
    cells = [Cell.from_dict(data) for data in spec["cells"]]

    def one_pass() -> dict[str, Any]:
        figures = {cell.key: engine.run(cell).to_dict(cell) for cell in cells}
        return {"cells": figures, "loaded_gib": loaded, "rss_gib": resident_gib(os.getpid())}

    answer_passes(asked, one_pass, answer_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin)
