"""``resq compare``: runs the methods one by one, keeps what is finished, and writes tables and plots."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from offline.compare.cache import RowCache, write_whole
from offline.compare.engine import Engine, MethodResult
from offline.compare.machine import machine
from offline.compare.options import chosen_methods
from offline.compare.plots import write_plots
from offline.compare.rows import CompareResult, Row
from offline.compare.table import csv_text, json_text, markdown
from resq_vllm import __version__
from resq_vllm.errors import ResQError

logger = logging.getLogger("resq")
CACHE_FOLDER = "rows"


class Tasks(Protocol):
    """Tasks that were loaded and can be run on a model (:class:`offline.evaluate.tasks.TaskSet`)."""

    def digest(self) -> str:
        """SHA-256 (hex) of everything in the tasks that decides an accuracy."""
        ...

    def run(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Accuracy by task."""
        ...


def compare(
    name: str,
    engine: Engine,
    output: Path,
    methods: tuple[str, ...] = (),
    tasks: Tasks | None = None,
    say: Callable[[str], None] = logger.info,
) -> CompareResult:
    """Measure the methods and write ``compare.json``, ``.csv``, ``.md`` and the plots into ``output``.

    Every finished row is saved at once, so the same call after a kill goes on with the next method, and after the end
    only reads. A method that fails has its reason in ``failures`` instead of a row.

    Args:
        name: of the model, for the title.
        engine: the model with its calibration and evaluation tokens.
        output: folder of the results; ``rows/`` in it keeps the finished rows.
        methods: names in the order wanted; empty = all of the engine's.
        tasks: to be run on every method's model; None = none.
        say: gets one line of progress at a time.

    Raises ResQError for an unknown method, or when ``output`` cannot be written.

    """
    labels = engine.methods()
    chosen = chosen_methods(methods, labels)
    cache = RowCache(output / CACHE_FOLDER)
    rows: list[Row] = []
    failures: dict[str, str] = {}
    keys: list[str] = []
    for number, method in enumerate(chosen, start=1):
        key = _key(engine.fingerprint(method), tasks)
        row = cache.get(method, key)
        found = "measured before"
        if row is None:
            say(f"[{number}/{len(chosen)}] {method} …")
            try:
                row = _measure(engine, method, labels[method], tasks)
            except Exception as error:  # whatever one method runs into, the others' rows are still wanted
                failures[method] = reason(error)
                logger.debug("method %s failed", method, exc_info=True)
                say(f"[{number}/{len(chosen)}] {method}: failed: {failures[method]}")
                continue
            cache.put(key, row)
            found = f"{row.seconds:.0f} s"
        rows.append(row)
        keys.append(key)
        say(f"[{number}/{len(chosen)}] {method}: perplexity {row.ppl:.3f} ({found})")
    result = CompareResult(
        model=name,
        tool_version=__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine(),
        protocol=dict(engine.protocol()),
        calibration=dict(engine.calibration()),
        rows=tuple(rows),
        failures=failures,
        fingerprint=hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
    )
    write_result(result, output)
    return result


def _key(fingerprint: str, tasks: Tasks | None) -> str:
    return fingerprint if tasks is None else hashlib.sha256(f"{fingerprint} {tasks.digest()}".encode()).hexdigest()


def _measure(engine: Engine, method: str, label: str, tasks: Tasks | None) -> Row:
    started = time.monotonic()
    result: MethodResult = engine.run(method, with_model=tasks is not None)
    seconds = time.monotonic() - started if result.seconds is None else result.seconds
    accuracies = tasks.run(result.model, result.tokenizer) if tasks is not None else {}
    return Row(
        method=method,
        label=label,
        ppl=result.ppl,
        ppl_by_text=dict(result.ppl_by_text),
        weight_bits=result.weight_bits,
        activation_bits=result.activation_bits,
        kv_bits=result.kv_bits,
        tasks=accuracies,
        seconds=round(seconds, 3),
        tokens=result.tokens,
        settings=dict(result.settings),
        note=result.note,
    )


def reason(error: Exception) -> str:
    """One line: our own sentences as they are, others with the exception's name."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ResQError) else f"{type(error).__name__}: {text}" if text else type(error).__name__


def write_result(result: CompareResult, output: Path) -> None:
    """Write the three texts and the plots into ``output``; raises ResQError when it cannot be written."""
    for ending, text in (("json", json_text(result)), ("csv", csv_text(result)), ("md", markdown(result))):
        write_whole(output / f"compare.{ending}", text)
    write_plots(result, output)


def require_all(result: CompareResult, output: Path) -> None:
    """Raises ResQError, naming the methods without a row, when there are any."""
    if result.failures:
        reasons = "; ".join(f"{method} ({why})" for method, why in result.failures.items())
        raise ResQError(
            f"{len(result.failures)} of {len(result.failures) + len(result.rows)} methods failed: {reasons}; "
            f"the others are in {output}, and the same command tries again only those that failed"
        )
