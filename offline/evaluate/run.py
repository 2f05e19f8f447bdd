"""``resq eval``: one perplexity, by the engine and of the model that the user names."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from offline.evaluate.dataset import load_dataset
from offline.evaluate.naive import load_naive_model
from offline.evaluate.perplexity import evaluate_perplexity, model_perplexity
from offline.evaluate.sequences import model_sequences
from offline.models.source import resolve_folder
from resq_vllm.errors import ResQError


def evaluate_model(
    model: str,
    dataset: str = "bundled",
    engine: Literal["reference", "vllm"] = "reference",
    seqlen: int | None = None,
    windows: int | None = None,
    naive_rtn: bool = False,
    tensor_parallel_size: int = 1,
    enforce_eager: bool = False,
) -> dict[str, object]:
    """Perplexity of a folder or hub id as a JSON-ready dict: perplexity, tokens, engine, dataset, protocol, ….

    Raises ResQError for flags that contradict each other and for everything that the engines refuse.
    """
    folder = resolve_folder(model)
    if naive_rtn:
        if engine != "reference":
            raise ResQError("--naive-rtn is a baseline in plain torch; use it without --engine vllm")
        sequences = model_sequences(folder, load_dataset(dataset), seqlen, windows)
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
        )
    fields = asdict(result)
    return {"model": model, "perplexity": fields.pop("value"), "engine": engine, "naive_rtn": naive_rtn} | fields
