"""`python -m benchmarks.llama_child SPEC ANSWER`: a process with llama.cpp, which runs all cells.

Through the C interface that the package llama-cpp-python wraps, as its Python class serves one sequence only. Prompts
are read in batches of up to 2048 tokens; then every sequence gets a token a step.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine_process import answer_passes
from benchmarks.process_memory import resident_gib
from benchmarks.scenarios import Cell, Measured

BATCH_TOKENS = 2048


class Llama:
    """A model and a context for `streams` sequences of `length` tokens."""

    def __init__(self, api: Any, model: Path, threads: int, vocabulary: int) -> None:
        self._api, self._threads, self._vocabulary = api, threads, vocabulary
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(os.fsencode(model), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}.")
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._context: Any = None

    def open(self, streams: int, length: int) -> None:
        """A fresh context (the earlier one is freed)."""
        api = self._api
        if self._context is not None:
            api.llama_free(self._context)
        options = api.llama_context_default_params()
        options.n_ctx = streams * (-(-length // 256) * 256)
        options.n_seq_max = streams
        options.n_batch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = self._threads
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context for {streams} sequences of {length} tokens.")

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wants logits); returns the likeliest next token for each that wants it."""
        batch = self._batch
        batch.n_tokens = len(entries)
        wanted = []
        for index, (token, position, sequence, logits) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = logits
            if logits:
                wanted.append(index)
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}.")
        return [self._likeliest(index) for index in wanted]

    def _likeliest(self, index: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, index)
        return int(
            np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,)).argmax()
        )

    def generate(self, prompts: list[list[int]], output: int) -> tuple[list[float], list[float]]:
        """Answer all prompts at once: seconds to the first token of each, and between its tokens."""
        started = time.perf_counter()
        waiting = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        current: dict[int, int] = {}
        first = []
        for start in range(0, len(waiting), BATCH_TOKENS):
            part = waiting[start : start + BATCH_TOKENS]
            tokens = self._decode(part)
            ending = [sequence for _, _, sequence, last in part if last]
            current |= dict(zip(ending, tokens, strict=True))
            first += [time.perf_counter() - started] * len(ending)
        all_read = time.perf_counter()
        for step in range(output - 1):
            entries = [(token, len(prompts[sequence]) + step, sequence, True) for sequence, token in current.items()]
            current = dict(zip(current, self._decode(entries), strict=True))
        between = (time.perf_counter() - all_read) / max(1, output - 1)
        return first, [between] * len(prompts)


def run(llama: Llama, cell: Cell, vocabulary: int, numbers: random.Random) -> Measured:
    """One pass over a cell."""
    scenario = cell.scenario
    first: list[float] = []
    between: list[float] = []
    seconds = 0.0
    for lot in [cell.streams] if cell.streams > 1 else [1] * cell.requests:
        # Making a context is what a server does once, at its start.
        llama.open(lot, scenario.prompt + scenario.output)
        prompts = [numbers.choices(range(4, vocabulary), k=scenario.prompt) for _ in range(lot)]
        started = time.perf_counter()
        times = llama.generate(prompts, scenario.output)
        seconds += time.perf_counter() - started
        first += times[0]
        between += times[1]
    return Measured(seconds, tuple(first), tuple(between))


def main(spec_file: Path, answer_file: Path, asked: Iterable[object] = (None,)) -> None:
    """Run the cells of the spec and write what was measured, as benchmarks.engine_child does."""
    spec = json.loads(spec_file.read_text())
    sys.path[:0] = spec["python_path"]
    llama_cpp = importlib.import_module("llama_cpp")
    vocabulary, numbers = spec["vocabulary"], random.Random(spec["seed"])
    llama = Llama(llama_cpp, Path(spec["model"]), spec["threads"], vocabulary)
    run(llama, Cell.from_dict(spec["warm_up"]), vocabulary, numbers)
    loaded = resident_gib(os.getpid())
    cells = [Cell.from_dict(data) for data in spec["cells"]]

    def one_pass() -> dict[str, Any]:
        figures = {cell.key: run(llama, cell, vocabulary, numbers).to_dict(cell) for cell in cells}
        return {"cells": figures, "loaded_gib": loaded, "rss_gib": resident_gib(os.getpid())}

    answer_passes(asked, one_pass, answer_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin)
