"""`python -m benchmarks.greedy_child SPEC ANSWER`: the greedy tokens of one engine for a list of prompts, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(spec_file: Path, answer_file: Path) -> None:
    """SPEC: {"options": of vLLM's LLM, "prompts": texts, "tokens": how many}; ANSWER: token ids by prompt."""
    from vllm import LLM, SamplingParams

    spec = json.loads(spec_file.read_text())
    llm = LLM(**spec["options"])
    sampling = SamplingParams(temperature=0.0, max_tokens=spec["tokens"], ignore_eos=True)
    outputs = llm.generate(spec["prompts"], sampling, use_tqdm=False)
    answer_file.write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
