"""The same likelihoods through vLLM: prompt_logprobs of the same token ids, computed by the served kernels.

vLLM starts worker processes: a script that calls this needs the usual ``if __name__ == "__main__":`` guard.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offline.evaluate.sequences import Sequences, context_length
from resq_vllm.errors import ResQError

_THREADS_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
# By default vLLM wants 92 % of a CPU machine's memory, and does not start when other processes hold the rest.
_CPU_KV_CACHE_BYTES = 2**30


def thread_binding(cores: list[int], ranks: int) -> str:
    """A value for VLLM_CPU_OMP_THREADS_BIND that gives every rank an equal share of all cores: "0,1" or "0|1".

    vLLM's own "auto" keeps a core back, which on a small machine is half of it.
    """
    share = max(1, len(cores) // ranks)
    parts = [cores[rank * share % len(cores) :][:share] for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in part) for part in parts)


def machine_options(tensor_parallel: int, kv_cache_bytes: int | None = None) -> dict[str, Any]:
    """Arguments of vLLM's LLM that depend on the machine; binds threads in the environment when this is a CPU.

    ``kv_cache_bytes``: size of the KV cache per rank; None = 1 GiB on a CPU, vLLM's default elsewhere.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault(_THREADS_VARIABLE, thread_binding(sorted(os.sched_getaffinity(0)), tensor_parallel))
        kv_cache_bytes = kv_cache_bytes or _CPU_KV_CACHE_BYTES
    return {} if kv_cache_bytes is None else {"kv_cache_memory_bytes": kv_cache_bytes}


def vllm_nll(
    directory: Path,
    sequences: Sequences,
    tensor_parallel: int = 1,
    enforce_eager: bool = True,
    kv_cache_bytes: int | None = None,
    progress: bool = True,
) -> list[float]:
    """Summed NLL in nats of each sequence, as :func:`offline.evaluate.perplexity.sequence_nll`, from a vLLM engine.

    Args:
        directory: model folder, plain or ResQ.
        sequences: token ids.
        tensor_parallel: ranks.
        enforce_eager: no compilation (a short evaluation spends more time compiling than it saves).
        kv_cache_bytes: size of the KV cache per rank; None = 1 GiB on a CPU, vLLM's default elsewhere.
        progress: show vLLM's progress bar.

    Raises ResQError when vLLM is not installed.

    """
    longest = max(len(ids) for ids in sequences.ids)
    if longest + 1 > context_length(directory):
        # Only the prompt is scored; the one token that vLLM insists on generating is never fed back past the context.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ResQError(
            f"the vllm engine cannot be imported ({error}); install vLLM or use the torch engine"
        ) from error
    options = machine_options(tensor_parallel, kv_cache_bytes)
    llm = LLM(
        model=str(directory),
        tensor_parallel_size=tensor_parallel,
        enforce_eager=enforce_eager,
        max_model_len=longest + 1,
        enable_prefix_caching=False,
        # Token ids go in and likelihoods come out.
        skip_tokenizer_init=True,
        seed=0,
        **options,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": list(ids)} for ids in sequences.ids]
    outputs = llm.generate(prompts, sampling, use_tqdm=progress)
    nll = [prompt_nll(output.prompt_logprobs, ids) for output, ids in zip(outputs, sequences.ids, strict=True)]
    # The engine's processes and its cache's memory go with the object.
    del llm
    gc.collect()
    return nll


def prompt_nll(logprobs: Sequence[Mapping[int, Any] | None], ids: tuple[int, ...]) -> float:
    """−Σ log p(token) over a prompt; vLLM's first entry is None, since nothing predicts the first token."""
    total = 0.0
    for entry, token in zip(logprobs[1:], ids[1:], strict=True):
        if entry is None or token not in entry:
            raise ResQError("vLLM returned no log probability for a prompt token; use the torch engine")
        total -= float(entry[token].logprob)
    return total
