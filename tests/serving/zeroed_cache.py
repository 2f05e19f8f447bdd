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
    from resq_vllm.attention import ResQAttentionImpl

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
    write = ResQAttentionImpl.do_kv_cache_update

    def write_and_erase(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        write(self, layer, key, value, kv_cache, slot_mapping)
        kv_cache.zero_()

    ResQAttentionImpl.do_kv_cache_update = write_and_erase  # type: ignore[method-assign]
    erased = answer()
    ResQAttentionImpl.do_kv_cache_update = write  # type: ignore[method-assign]
    print(json.dumps({"packed": packed, "erased": erased, "again": answer()}))


if __name__ == "__main__":
    main(sys.argv[1])
