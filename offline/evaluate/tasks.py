"""lm-eval tasks by name, by set or from local files: loaded before any model, run on any of ours.

The package lm_eval belongs to the extra ``eval`` (``pip install resq-vllm[eval]``) and is imported when tasks are asked
for.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from resq_vllm.errors import ResQError

# The tasks of the paper's tables (§6 there), zero-shot.
SETS: dict[str, tuple[str, ...]] = {
    "paper": ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande")
}
# The figure of a task: the first of these that it has. Normalized by length where defined, as in the paper's tables.
METRICS = ("acc_norm", "acc", "exact_match")
_FEWSHOT_SEED = 1234  # lm-eval's own default
_TASK_FILES = (".yaml", ".yml")


class TaskSet:
    """Loaded tasks, their documents in memory, ready to be run on one model after the other."""

    def __init__(self, tasks: Mapping[str, Any], groups: Mapping[str, Any], limit: int | None) -> None:
        """``tasks``: lm-eval tasks by name; ``groups``: lm-eval groups of them by name; ``limit``: documents a task."""
        self._tasks = dict(tasks)
        self._groups = dict(groups)
        self.limit = limit
        for task in self._tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    @property
    def names(self) -> tuple[str, ...]:
        """What figures are reported for: groups as a whole where lm-eval averages them, else their tasks."""
        whole = [name for name, group in self._groups.items() if group.has_aggregation]
        inside = {task.task_name for name in whole for task in self._groups[name].get_all_tasks()}
        nested = {group.name for name in whole for group in self._groups[name].get_all_groups()}
        return tuple(n for n in whole if n not in nested) + tuple(n for n in self._tasks if n not in inside)

    def digest(self) -> str:
        """SHA-256 (hex) over lm-eval's version, the tasks' settings and all of their documents."""
        total = hashlib.sha256(f"{importlib.metadata.version('lm_eval')} {self.limit} {self.names}".encode())
        for name, task in sorted(self._tasks.items()):
            settings = task.config.to_dict(keep_callable=False)
            settings["metadata"] = dict(settings.get("metadata") or {})
            # Where files lie on this machine; their content counts instead.
            settings["metadata"].pop("config_source", None)
            settings.pop("dataset_kwargs", None)
            total.update(json.dumps([name, settings], sort_keys=True, default=str).encode())
            examples = task.fewshot_docs() if settings.get("num_fewshot") else None
            for document in [*task.eval_docs, *(examples or ())]:
                total.update(json.dumps(document, sort_keys=True, default=str).encode())
        return total.hexdigest()

    def run(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Accuracies 0 … 1 by name, of a torch model that :func:`offline.evaluate.harness.torch_lm` takes."""
        from offline.evaluate.harness import torch_lm

        with _quiet():
            lm = torch_lm(model, tokenizer)
        return self.run_lm(lm)

    def run_lm(self, lm: Any) -> dict[str, float]:
        """Accuracies 0 … 1 by name, of an lm-eval model; raises ResQError for a task without any of METRICS."""
        from lm_eval.evaluator import evaluate

        with _quiet():
            results = evaluate(
                lm,
                {"tasks": self._tasks, "groups": self._groups},
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        figures = results["results"] | results.get("groups", {})
        return {name: figure(name, figures[name]) for name in self.names}


def figure(name: str, metrics: Mapping[str, Any]) -> float:
    """The first of METRICS in lm-eval's ``metric,filter`` mapping; raises ResQError when it has none of them."""
    for wanted in METRICS:
        for key, value in metrics.items():
            if key.partition(",")[0] == wanted:
                return float(value)
    known = sorted({key.partition(",")[0] for key, value in metrics.items() if isinstance(value, float)})
    raise ResQError(
        f"task {name}: has none of the metrics {', '.join(METRICS)} (but {', '.join(known) or 'none at all'}); "
        "choose another task, or give it an accuracy in a task file of your own"
    )


def load_tasks(names: Sequence[str], limit: int | None = None) -> TaskSet:
    """Load tasks with their documents.

    Args:
        names: of lm-eval's tasks, groups or tags; of sets ("paper"); task files PATH.yaml; folders of task files.
        limit: use the first ``limit`` documents of each task only; None = all.

    Raises ResQError, naming the task and the remedy, for an unknown name, a file that is no task, a task whose data
    need the network when there is none, and a missing lm_eval.

    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ResQError(
            f"tasks need the package lm_eval ({error}); `pip install 'resq-vllm[eval]'`, or leave out --tasks"
        ) from error
    if limit is not None and limit < 1:
        raise ResQError(f"--task-limit is {limit}; give a positive number of documents")
    wanted = list(dict.fromkeys(part for name in names for part in SETS.get(name, (name,))))
    if not wanted:
        raise ResQError(f"--tasks names no task; give names of lm-eval's tasks, the set {', '.join(SETS)}, or files")
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with _quiet():
        for name in wanted:
            found = _load_local(Path(name)) if _is_local(name) else _load_shipped(name)
            tasks |= found["tasks"]
            groups |= found.get("groups", {})
    return TaskSet(tasks, groups, limit)


def _is_local(name: str) -> bool:
    return name.endswith(_TASK_FILES) or "/" in name or Path(name).is_dir()


@cache
def _shipped() -> Any:
    """lm-eval's own tasks; reading the index of thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_shipped(name: str) -> Any:
    manager = _shipped()
    known = manager.all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=6, cutoff=0.5)
        near += [other for other in known if name in other and other not in near][: 6 - len(near)]
        hint = f"near it are {', '.join(near)}" if near else "`lm_eval ls tasks` lists all"
        raise ResQError(
            f"task {name}: unknown to lm_eval {importlib.metadata.version('lm_eval')}; {hint}; "
            "a task of your own is given as PATH.yaml"
        )
    return _load(manager, name, name)


def _load_local(path: Path) -> Any:
    from lm_eval.tasks import TaskManager

    if not path.exists():
        raise ResQError(f"task {path}: no such file or folder; give a task file PATH.yaml or a folder of them")
    if path.is_dir():
        manager = TaskManager(include_path=str(path), include_defaults=False)
        names = manager.all_subtasks
        if not names:
            raise ResQError(f"task {path}: the folder holds no task file; give one with *.yaml files of lm-eval tasks")
        loaded = [_load(manager, name, str(path), path.resolve()) for name in names]
        return {"tasks": {name: task for found in loaded for name, task in found["tasks"].items()}}
    group = re.search(r"^group:\s*(\S+)", _text(path), re.MULTILINE)
    if group is None:
        manager, name = TaskManager(include_defaults=False), str(path.resolve())
    else:
        # A group names tasks of other files in its folder, or of lm-eval's own.
        manager, name = TaskManager(include_path=str(path.parent)), group.group(1)
    return _load(manager, name, str(path), path.resolve().parent)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResQError(f"task {path}: cannot be read ({error}); give a task file of lm-eval in YAML") from error


def _load(manager: Any, spec: str, shown: str, folder: Path | None = None) -> Any:
    """``folder``: where data files of a local task are looked for first, then in the working directory."""
    try:
        try:
            with contextlib.chdir(folder) if folder is not None else contextlib.nullcontext():
                return manager.load([spec])
        except FileNotFoundError:
            if folder is None:
                raise
            return manager.load([spec])
    except ConnectionError as error:
        raise ResQError(
            f"task {shown}: its data are on the Hugging Face Hub, which cannot be reached ({_line(error)}); connect to "
            "the network, set HF_HOME to a cache that holds them, or give a local task file PATH.yaml"
        ) from error
    except ResQError:
        raise
    except Exception as error:  # YAML, the task's own code, data builders: no common base class
        raise ResQError(
            f"task {shown}: cannot be loaded ({type(error).__name__}: {_line(error)}); "
            "check its task file and data files"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells much about tasks that nobody asked for; warnings of data sets stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
