"""The stages 8b and 1b of benchmarks.gpu_serve: a child with an engine for every contender, its cells kept one by one.

A contender that is stopped keeps the cells it finished; the next call starts an engine for the others alone. All calls
make the same engine whichever cells they ask for, so that cells of several calls can be compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import vllm_environment
from benchmarks.gpu_serve_answers import Answers, commit
from benchmarks.gpu_serve_contenders import CAPTURE_SIZES, CELLS, CONTENDERS, Contender, key, model_folder
from benchmarks.gpu_serve_process import ran_out, run_limited
from benchmarks.scenarios import Cell, longest

_SEED = 20241214
# Past the longest request, for the tokens that vLLM rounds up to.
_ROOM = 64


@dataclass(frozen=True)
class Run:
    """What all contenders of a call share.

    limit: seconds of one process; deadline: of the stage, on time.monotonic(); memory: arguments that size the cache.
    """

    shape: str
    cells: tuple[Cell, ...]
    work: Path
    limit: float
    deadline: float
    memory: dict[str, Any]
    answers: Answers

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def has_time(self) -> bool:
        """Whether a process can have its full limit: with less, its start would be all that it does."""
        return self.seconds_left >= self.limit


def memory_options(kv_cache_bytes: int | None) -> dict[str, Any]:
    """Arguments of the engine that say how much memory it may take."""
    return {"gpu_memory_utilization": 0.9} if kv_cache_bytes is None else {"kv_cache_memory_bytes": kv_cache_bytes}


def engine_options(contender: Contender, run: Run) -> dict[str, Any]:
    """Arguments of vLLM's engine: large enough for all of CELLS, and for others that are asked for."""
    cells = (*CELLS, *run.cells)
    tokens = longest(cells) + _ROOM
    return {
        "model": str(model_folder(run.work / "models", run.shape, contender, tokens)),
        "max_model_len": tokens,
        "max_num_seqs": max(cell.streams for cell in cells),
        "cudagraph_capture_sizes": list(CAPTURE_SIZES),
        **run.memory,
        **contender.options,
    }


def engine_environment() -> dict[str, str]:
    """Of every engine: one process, one import; its log must speak of errors whatever the shell says."""
    return vllm_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"})


def measure(name: str, run: Run, cells: Sequence[Cell]) -> dict[str, Any]:
    """One child: {"kv_tokens", "cells", "reason", "running"}.

    reason: None when it ran to its end; running: key of the cell in which it ended early, absent before the first.
    """
    folder = run.work / run.shape
    folder.mkdir(parents=True, exist_ok=True)
    spec_file, answer_file = folder / f"{name}.spec.json", folder / f"{name}.answer.json"
    answer_file.unlink(missing_ok=True)
    spec = {
        "options": engine_options(CONTENDERS[name], run),
        "seed": _SEED,
        "cells": {key(cell): cell.to_dict() for cell in cells},
    }
    spec_file.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "benchmarks.gpu_serve_child", str(spec_file), str(answer_file)]
    reason = run_limited(command, engine_environment(), folder / f"{name}.log", run.limit)
    answer: dict[str, Any] = {"kv_tokens": None, "cells": {}}
    if answer_file.exists():
        answer |= json.loads(answer_file.read_text())
    return answer | {"reason": reason}


def missing(name: str, run: Run) -> list[Cell]:
    """Cells that the contender has no answer for yet."""
    kept = run.answers.get(name, {"cells": {}})["cells"]
    return [cell for cell in run.cells if key(cell) not in kept]


def merged(kept: dict[str, Any] | None, answer: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """What is kept of a contender: {"kv_tokens", "cells", "stops": times in a row that it was stopped without a cell}.

    A crash is the answer of the cell in which it happened, or of all when it happened before the first.
    """
    kept = kept or {"kv_tokens": None, "cells": {}, "stops": 0}
    found = dict(answer["cells"])
    stopped = answer["reason"] is not None and ran_out(answer["reason"])
    if answer["reason"] is not None and not stopped:
        crashed = [answer["running"]] if "running" in answer else [name for name in wanted if name not in found]
        found |= {name: {"reason": answer["reason"]} for name in crashed}
    cells = kept["cells"] | {name: cell | {"commit": commit()} for name, cell in found.items()}
    stops = kept["stops"] + 1 if stopped and not found else 0
    return {"kv_tokens": answer["kv_tokens"] or kept["kv_tokens"], "cells": cells, "stops": stops}


def forget(names: Sequence[str], run: Run) -> None:
    """Drop what is kept of these contenders' cells."""
    for name in names:
        kept = run.answers.get(name)
        if kept:
            dropped = {key(cell) for cell in run.cells}
            left = {name: cell for name, cell in kept["cells"].items() if name not in dropped}
            run.answers.put(name, kept | {"cells": left, "stops": 0})


def engines(names: Sequence[str], run: Run, say: Callable[[str], None]) -> bool:
    """Measure what is missing as long as there is time; whether nothing is missing then.

    One that was stopped has its next turn after the others, as long as every turn finishes a cell; one that no turn
    helped comes last in the next call, too.
    """
    waiting = [name for name in names if missing(name, run)]
    waiting.sort(key=lambda name: run.answers.get(name, {"stops": 0})["stops"])
    while waiting and run.has_time:
        name = waiting.pop(0)
        wanted = [key(cell) for cell in missing(name, run)]
        started = time.monotonic()
        answer = measure(name, run, missing(name, run))
        run.answers.put(name, merged(run.answers.get(name), answer, wanted))
        figures = [f"{k} {c['decode_tokens_s']:.0f}" for k, c in answer["cells"].items() if "reason" not in c]
        said = f"{', '.join(figures) or 'no figures'}; {answer['reason'] or 'done'}"
        say(f"{name}: {time.monotonic() - started:.0f} s, decode tokens/s: {said}")
        if missing(name, run) and not run.answers[name]["stops"]:
            waiting.append(name)
        elif missing(name, run):
            say(f"{name}: {wanted[0]} and its engine's start take more than {run.limit:.0f} s; give a larger --limit")
    unfinished = [name for name in names if missing(name, run)]
    if unfinished:
        left = f"{max(0, run.seconds_left):.0f} s left, a contender's limit is {run.limit:.0f} s"
        say(f"not finished: {', '.join(unfinished)} ({left}); call the stage again")
    return not unfinished
