"""Whether the served bundled model is right: perplexity against the reference, the same tokens under CUDA graphs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import vllm_environment
from benchmarks.gpu_serve_process import run_limited
from benchmarks.report import rounded
from offline.bundled import HELDOUT_TEXT, MODEL_DIR

# Of 2048 tokens or the model's context; a third of the held-out text, seconds in the float32 reference.
WINDOWS = 24
# Perplexity of the served model may differ from the reference's by this much.
TOLERANCE = 0.005
PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 16, 600, 64

# Engines whose arithmetic is the same, so that only graphs differ: torch.compile fuses, and rounds otherwise.
GPU_MODES: dict[str, dict[str, dict[str, Any]]] = {
    "without torch.compile": {
        "eager": {"enforce_eager": True},
        "full graphs of decodes": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    },
    "with torch.compile": {
        "no graphs": {"compilation_config": {"cudagraph_mode": "NONE"}},
        "piecewise graphs": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
        "full and piecewise graphs": {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
    },
}
# A CPU has no graphs: the same engine twice, which shows that the check itself holds.
CPU_MODES: dict[str, dict[str, dict[str, Any]]] = {
    "without torch.compile": {"eager": {"enforce_eager": True}, "eager again": {"enforce_eager": True}},
}


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


class Steps:
    """Runs one command after another, each within its own limit and the stage's."""

    def __init__(self, folder: Path, limit: float, deadline: float, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._limit = limit
        self._deadline = deadline
        self._say = say
        self.failures: list[str] = []

    def run(self, name: str, command: list[str], limits: float = 1) -> bool:
        """Whether the command ended well; why not goes into `failures`."""
        left = self._deadline - time.monotonic()
        started = time.monotonic()
        log = self._folder / f"{name.replace(' ', '-')}.log"
        reason = (
            "no time left" if left < 1 else run_limited(command, environment(), log, min(limits * self._limit, left))
        )
        self._say(f"{name}: {time.monotonic() - started:.0f} s, {reason or 'done'}")
        if reason:
            self.failures.append(f"{name}: {reason}")
        return reason is None


def environment() -> dict[str, str]:
    return vllm_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def prompts() -> list[str]:
    """Pieces of the held-out text, spread over it."""
    text = HELDOUT_TEXT.read_text(encoding="utf-8")
    step = (len(text) - PROMPT_CHARACTERS) // PROMPTS
    return [text[i * step : i * step + PROMPT_CHARACTERS] for i in range(PROMPTS)]


def agreement(tokens: Mapping[str, list[list[int]]]) -> list[dict[str, Any]]:
    """Of every engine but the first: how many of its sequences and tokens are the first's (up to where they part)."""
    (first, expected), *others = tokens.items()
    lines = []
    for name, found in others:
        same = [
            next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
            for ours, theirs in zip(found, expected, strict=True)
        ]
        lines.append(
            {
                "engine": name,
                "against": first,
                "sequences": len(expected),
                "same_sequences": sum(count == len(row) for count, row in zip(same, expected, strict=True)),
                "tokens": sum(len(row) for row in expected),
                "same_tokens": sum(same),
            }
        )
    return lines


def perplexities(steps: Steps, folder: Path, models: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A row a model: perplexity of the float32 reference and of the served model, and whether they agree."""
    lines = []
    for name, model in models.items():
        found: dict[str, float] = {}
        for engine in ("vllm", "reference"):
            answer = folder / f"{name}-{engine}.json"
            answer.unlink(missing_ok=True)
            flags = ["--engine", engine, "--windows", str(WINDOWS), "--json", str(answer)]
            if steps.run(f"perplexity {name} {engine}", python("offline.cli", "eval", str(model), *flags)):
                found[engine] = json.loads(answer.read_text())["perplexity"]
        if len(found) == 2:
            off = found["vllm"] / found["reference"] - 1
            lines.append(
                {"check": "perplexity", "model": name, **found, "off": rounded(off), "ok": abs(off) <= TOLERANCE}
            )
            if abs(off) > TOLERANCE:
                steps.failures.append(f"perplexity of {name}: vLLM's is off by {off:.2%}")
    return lines


def greedy(
    steps: Steps,
    folder: Path,
    model: Path,
    memory: Mapping[str, Any],
    modes: Mapping[str, Mapping[str, dict[str, Any]]],
) -> list[dict[str, Any]]:
    """A row a mode of vLLM: how many greedy tokens are those of the first mode with the same arithmetic."""
    lines = []
    for arithmetic, engines in modes.items():
        tokens: dict[str, list[list[int]]] = {}
        for name, options in engines.items():
            spec, answer = folder / f"greedy-{name}.spec.json", folder / f"greedy-{name}.json"
            answer.unlink(missing_ok=True)
            given = {"model": str(model), "max_model_len": 1024, "max_num_seqs": PROMPTS, **memory, **options}
            spec.write_text(json.dumps({"options": given, "prompts": prompts(), "tokens": NEW_TOKENS}))
            if steps.run(f"greedy {name}", python("benchmarks.greedy_child", str(spec), str(answer))):
                tokens[name] = json.loads(answer.read_text())
        for line in agreement(tokens) if len(tokens) > 1 else ():
            ok = line["same_tokens"] == line["tokens"]
            lines.append({"check": "greedy tokens", "arithmetic": arithmetic, **line, "ok": ok})
            if not ok:
                steps.failures.append(
                    f"greedy tokens: {line['engine']} gives {line['same_tokens']} of {line['tokens']} as "
                    f"{line['against']}"
                )
    return lines


def check(
    work: Path,
    checkpoint: Path | None,
    limit: float,
    deadline: float,
    memory: Mapping[str, Any],
    say: Callable[[str], None],
    modes: Mapping[str, Mapping[str, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """{"rows", "failures", "checkpoint"} of all checks; the checkpoint is made in `work` unless it is given."""
    folder = work / "correctness"
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder, limit, deadline, say)
    ours = checkpoint or work / "checkpoint"
    if not (ours / "config.json").exists():
        steps.run("quantize", python("offline.cli", "quantize", str(MODEL_DIR), "-o", str(ours)), 2)
    lines: list[dict[str, Any]] = []
    if (ours / "config.json").exists():
        chosen = modes or (GPU_MODES if torch.cuda.is_available() else CPU_MODES)
        lines += greedy(steps, folder, ours, memory, chosen)
        lines += perplexities(steps, folder, {"resq": ours, "bf16": MODEL_DIR})
    return {"rows": lines, "failures": steps.failures, "checkpoint": ours.name}
