"""``resq eval``: perplexity and lm-eval tasks, by the engine and of the model that the user names."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from offline.evaluate.dataset import load_dataset
from offline.evaluate.naive import load_naive_model
from offline.evaluate.perplexity import evaluate_perplexity, model_perplexity
from offline.evaluate.reference_model import load_reference_model
from offline.evaluate.sequences import model_sequences
from offline.evaluate.tasks import TaskSet, load_tasks
from offline.models.source import resolve_folder
from offline.models.tokenizer import load_tokenizer
from resq_vllm.errors import ResQError

Engine = Literal["reference", "vllm"]


def evaluate_model(
    model: str,
    dataset: str | None = None,
    engine: Engine = "reference",
    seqlen: int | None = None,
    windows: int | None = None,
    naive_rtn: bool = False,
    tensor_parallel_size: int = 1,
    enforce_eager: bool = False,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, object]:
    """Figures of a folder or hub id as a JSON-ready dict: perplexity, tokens, engine, dataset, protocol, ….

    Args:
        model: folder or hub id.
        dataset: what perplexity is measured on; None = the bundled text, or no perplexity when there are tasks.
        engine: plain torch, or vLLM.
        seqlen: tokens a window.
        windows: at most so many.
        naive_rtn: quantize a plain model naively first; reference engine only.
        tensor_parallel_size: vLLM only.
        enforce_eager: vLLM only.
        tasks: lm-eval tasks (:func:`offline.evaluate.tasks.load_tasks`); the dict then has ``tasks``, accuracy by name.
        task_limit: documents a task, at most.
        trust_remote_code: let the tokenizer run code from the folder.

    Raises ResQError for flags that contradict each other and for everything that the engines refuse.

    """
    folder = resolve_folder(model)
    if naive_rtn and engine != "reference":
        raise ResQError("--naive-rtn is a baseline in plain torch; use it without --engine vllm")
    # Before any model is loaded: a wrong name must not cost minutes.
    task_set = load_tasks(tasks, task_limit) if tasks else None
    found: dict[str, object] = {"model": model, "engine": engine, "naive_rtn": naive_rtn}
    if dataset is not None or task_set is None:
        found |= _perplexity(
            folder,
            dataset or "bundled",
            engine,
            seqlen,
            windows,
            naive_rtn,
            tensor_parallel_size,
            enforce_eager,
            trust_remote_code,
        )
    if task_set is not None:
        found["tasks"] = _accuracies(
            folder, task_set, engine, naive_rtn, tensor_parallel_size, enforce_eager, trust_remote_code
        )
    return found


def _perplexity(
    folder: Path,
    dataset: str,
    engine: Engine,
    seqlen: int | None,
    windows: int | None,
    naive_rtn: bool,
    tensor_parallel_size: int,
    enforce_eager: bool,
    trust_remote_code: bool,
) -> dict[str, object]:
    if naive_rtn:
        sequences = model_sequences(folder, load_dataset(dataset), seqlen, windows, trust_remote_code)
        result = model_perplexity(load_naive_model(folder), sequences)
    else:
        result = evaluate_perplexity(
            folder,
            dataset,
            "vllm" if engine == "vllm" else "torch",
            seqlen,
            windows,
            tensor_parallel=tensor_parallel_size,
            enforce_eager=enforce_eager,
            trust_remote_code=trust_remote_code,
        )
    fields = asdict(result)
    return {"perplexity": fields.pop("value")} | fields


def _accuracies(
    folder: Path,
    tasks: TaskSet,
    engine: Engine,
    naive_rtn: bool,
    tensor_parallel_size: int,
    enforce_eager: bool,
    trust_remote_code: bool,
) -> dict[str, float]:
    if engine == "vllm":
        from offline.evaluate.harness import vllm_lm

        lm = vllm_lm(folder, tensor_parallel_size, enforce_eager, trust_remote_code)
        accuracies = tasks.run_lm(lm)
        # The engine's processes go with the object, which refers to itself.
        del lm
        gc.collect()
        return accuracies
    model = load_naive_model(folder) if naive_rtn else load_reference_model(folder)
    return tasks.run(model, load_tokenizer(folder, trust_remote_code))
