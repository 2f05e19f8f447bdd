"""What the command ``resq compare`` does with its checked options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from offline.compare.cache import write_whole
from offline.compare.engine import Engine
from offline.compare.options import CompareOptions, default_folder
from offline.compare.run import compare, require_all
from offline.compare.table import json_text, print_table
from offline.evaluate.tasks import load_tasks
from offline.memory import peak_memory

OpenEngine = Callable[[str, CompareOptions, Path], Engine]


def run_compare(
    options: CompareOptions, open_engine: OpenEngine, output: Path | None = None, json_file: Path | None = None
) -> None:
    """Measure with the engine that ``open_engine`` (model, options, output) gives; print the table, write the files.

    Progress goes to stderr, the table to stdout. Raises ResQError for bad input, and after everything is written when
    methods failed.
    """
    folder = output or default_folder(options.model)
    tasks = load_tasks(options.tasks, options.task_limit) if options.tasks else None
    engine = open_engine(options.model, options, folder)
    result = compare(options.model, engine, folder, options.methods, tasks, say=_say)
    print_table(result)
    if json_file is not None:
        write_whole(json_file, json_text(result))
    _say(f"tables and plots are in {folder} (peak memory {peak_memory():.1f} GiB)")
    require_all(result, folder)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
