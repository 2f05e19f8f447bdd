"""llama.cpp's loop: batches, positions, sequences — against a stand-in for its C interface."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.llama_child import BATCH_TOKENS, Llama, run
from benchmarks.scenarios import Cell, Scenario

VOCABULARY = 50


class Recorder:
    """Counts and remembers what llama_decode was given; the likeliest token is always the entry's own plus one."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.steps: list[list[tuple[int, int, int]]] = []
        self.contexts: list[tuple[int, int]] = []

    def llama_backend_init(self) -> None:
        return None

    def llama_model_default_params(self) -> object:
        return object()

    def llama_model_load_from_file(self, path: bytes, options: object) -> object | None:
        return None if path.endswith(b"absent") else object()

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_init_from_model(self, model: object, options: Any) -> object:
        self.contexts.append((options.n_ctx, options.n_seq_max))
        return object()

    def llama_free(self, context: object) -> None:
        return None

    def llama_batch_init(self, tokens: int, _: int, sequences: int) -> SimpleNamespace:
        arrays = {name: [0] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**arrays, seq_id=[[0] * sequences for _ in range(tokens)], n_tokens=0)

    def llama_decode(self, context: object, batch: Any) -> int:
        self._tokens = batch.token
        self.steps.append([(batch.token[i], batch.pos[i], batch.seq_id[i][0]) for i in range(batch.n_tokens)])
        return self.status

    def llama_get_logits_ith(self, context: object, index: int) -> Any:
        self._row = (ctypes.c_float * VOCABULARY)()
        self._row[(self._tokens[index] + 1) % VOCABULARY] = 1.0
        return self._row


def test_sequences_advance_together_after_their_prompts() -> None:
    api = Recorder()
    llama = Llama(api, Path("model"), 2, VOCABULARY)
    llama.open(2, 6)
    first, between = llama.generate([[7, 8, 9], [20, 21, 22]], 3)
    assert api.steps[0] == [(7, 0, 0), (8, 1, 0), (9, 2, 0), (20, 0, 1), (21, 1, 1), (22, 2, 1)]
    assert api.steps[1:] == [[(10, 3, 0), (23, 3, 1)], [(11, 4, 0), (24, 4, 1)]]
    assert len(first) == len(between) == 2


def test_long_prompts_are_read_in_batches() -> None:
    api = Recorder()
    llama = Llama(api, Path("model"), 2, VOCABULARY)
    llama.open(1, BATCH_TOKENS + 20)
    llama.generate([[5] * (BATCH_TOKENS + 10)], 2)
    assert [len(step) for step in api.steps] == [BATCH_TOKENS, 10, 1]
    assert api.steps[2][0][1] == BATCH_TOKENS + 10


def test_cell_makes_a_context_for_its_streams() -> None:
    api = Recorder()
    llama = Llama(api, Path("model"), 2, VOCABULARY)
    run(llama, Cell(Scenario("mixed", 20, 4), 3), VOCABULARY, random.Random(0))
    measured = run(llama, Cell(Scenario("decode", 300, 2, repeats=2), 1), VOCABULARY, random.Random(0))
    assert api.contexts == [(3 * 256, 3), (512, 1), (512, 1)]
    assert len(measured.first) == 2


def test_failures_are_sentences() -> None:
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot load absent\."):
        Llama(Recorder(), Path("absent"), 1, VOCABULARY)
    llama = Llama(Recorder(status=1), Path("model"), 1, VOCABULARY)
    llama.open(1, 8)
    with pytest.raises(RuntimeError, match="llama_decode failed with status 1"):
        llama.generate([[1, 2]], 1)
