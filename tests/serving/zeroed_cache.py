"""Script: answers with the packed cache as it is, then with every page erased after each write; prints both as JSON.

The engine runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so its attention can be patched from here.
Usage: python -m tests.serving.zeroed_cache CHECKPOINT
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(checkpoint: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from offline.bundled import HELDOUT_TEXT
    from resq_vllm import ops

    llm = LLM(
        checkpoint,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0)
    prompt = HELDOUT_TEXT.read_text(encoding="utf-8")[:500]

    def answer() -> dict[str, Any]:
        output = llm.generate(prompt, sampling, use_tqdm=False)[0]
        likelihoods = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        return {"text": output.outputs[0].text, "nll": -sum(likelihoods) / len(likelihoods)}

    packed = answer()
    write_and_attend = ops.kv_write_attention

    def erase_between(query: Any, key: Any, value: Any, cache: Any, out: Any, slots: Any, *batch: Any) -> None:
        """batch: block table, lengths, query starts, rotation, scale, high, low_bits, sliding window."""
        rotation, high, low_bits = batch[3], batch[5], batch[6]
        ops.kv_write(key, value, cache, slots, rotation, high, low_bits)
        cache.zero_()
        ops.attention(query, cache, out, *batch)

    ops.kv_write_attention = erase_between  # type: ignore[assignment]
    erased = answer()
    ops.kv_write_attention = write_and_attend
    print(json.dumps({"packed": packed, "erased": erased, "again": answer()}))


if __name__ == "__main__":
    main(sys.argv[1])
