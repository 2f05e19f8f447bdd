"""Whether the served bundled model is right: perplexity against the reference, the same tokens under CUDA graphs."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import vllm_environment
from benchmarks.gpu_serve_answers import Answers, commit, pack, unpack
from benchmarks.gpu_serve_process import ran_out, run_limited
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
    """Runs one command after another, each within a full limit of its own; what one answered is kept."""

    def __init__(
        self, folder: Path, answers: Answers, limit: float, deadline: float, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._answers = answers
        self._limit = limit
        self._deadline = deadline
        self._say = say
        self.failures: list[str] = []
        self.unfinished: list[str] = []

    def run(self, name: str, command: list[str], limits: float = 1) -> bool:
        """Whether the command ended well; otherwise it goes into `failures`, or `unfinished` for want of time."""
        limit = limits * self._limit
        if self._deadline - time.monotonic() < limit:
            self.unfinished.append(name)
            return False
        started = time.monotonic()
        reason = run_limited(command, environment(), self._folder / f"{name.replace(' ', '-')}.log", limit)
        self._say(f"{name}: {time.monotonic() - started:.0f} s, {reason or 'done'}")
        if reason and ran_out(reason):
            self.unfinished.append(name)
        elif reason:
            self.failures.append(f"{name}: {reason}")
        return reason is None

    def answer(self, name: str, command: list[str], file: Path) -> Any:
        """What the command writes to its JSON file, of an earlier call where it ended there; None without an answer."""
        kept = self._answers.get(name)
        if kept is None:
            file.unlink(missing_ok=True)
            failed = len(self.failures)
            if self.run(name, command):
                kept = {"answer": json.loads(file.read_text())}
            elif len(self.failures) > failed:
                kept = {"failure": self.failures.pop()}
            else:
                return None
            self._answers.put(name, kept | {"commit": commit()})
        if "failure" in kept:
            self.failures.append(kept["failure"])
        return kept.get("answer")


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
            file = folder / f"{name}-{engine}.json"
            flags = ["--engine", engine, "--windows", str(WINDOWS), "--json", str(file)]
            command = python("offline.cli", "eval", str(model), *flags)
            answer = steps.answer(f"perplexity {name} {engine}", command, file)
            if answer is not None:
                found[engine] = answer["perplexity"]
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
            spec, file = folder / f"greedy-{name}.spec.json", folder / f"greedy-{name}.json"
            given = {"model": str(model), "max_model_len": 1024, "max_num_seqs": PROMPTS, **memory, **options}
            spec.write_text(json.dumps({"options": given, "prompts": prompts(), "tokens": NEW_TOKENS}))
            answer = steps.answer(f"greedy {name}", python("benchmarks.greedy_child", str(spec), str(file)), file)
            if answer is not None:
                tokens[name] = answer
        # Without the first there is nothing to compare the others with.
        for line in agreement(tokens) if len(tokens) > 1 and next(iter(engines)) in tokens else ():
            ok = line["same_tokens"] == line["tokens"]
            lines.append({"check": "greedy tokens", "arithmetic": arithmetic, **line, "ok": ok})
            if not ok:
                steps.failures.append(
                    f"greedy tokens: {line['engine']} gives {line['same_tokens']} of {line['tokens']} as "
                    f"{line['against']}"
                )
    return lines


def fingerprint(model: Path) -> str:
    """Of a checkpoint's weights and configuration: answers of another one are not comparable."""
    found = hashlib.sha256()
    for file in (*sorted(model.glob("*.safetensors")), model / "config.json"):
        found.update(file.read_bytes())
    return found.hexdigest()


def quantized(work: Path, archive: Path, steps: Steps) -> Path | None:
    """The bundled model's checkpoint in `work`, begun or made by an earlier call or now; None while it is not ready.

    archive: what there is of it, for a later call on another machine.
    """
    ours = work / "checkpoint"
    if not any(work.glob("checkpoint*")) and archive.exists():
        unpack(archive, work)
    if not (ours / "config.json").exists():
        steps.run("quantize", python("offline.cli", "quantize", str(MODEL_DIR), "-o", str(ours), "--resume"), 2)
        pack(archive, (file for file in work.glob("checkpoint*/**/*") if file.is_file()), work)
    return ours if (ours / "config.json").exists() else None


def check(
    work: Path,
    archive: Path,
    answers: Answers,
    checkpoint: Path | None,
    limit: float,
    deadline: float,
    memory: Mapping[str, Any],
    say: Callable[[str], None],
    modes: Mapping[str, Mapping[str, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """{"rows", "failures", "unfinished", "checkpoint"} of all checks.

    The checkpoint is made in `work`, and kept in `archive` for later calls, unless it is given.
    """
    folder = work / "correctness"
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder, answers, limit, deadline, say)
    ours = checkpoint or quantized(work, archive, steps)
    lines: list[dict[str, Any]] = []
    if ours is not None:
        same = fingerprint(ours)
        if answers.get("checkpoint", same) != same:
            say("the checkpoint is another one than before: all is measured anew")
            answers.forget()
        answers.put("checkpoint", same)
        chosen = modes or (GPU_MODES if torch.cuda.is_available() else CPU_MODES)
        lines += greedy(steps, folder, ours, memory, chosen)
        lines += perplexities(steps, folder, {"resq": ours, "bf16": MODEL_DIR})
    if steps.unfinished:
        left = f"{max(0, deadline - time.monotonic()):.0f} s left, a step's limit is {limit:.0f} s"
        say(f"not finished: {', '.join(steps.unfinished)} ({left}); call the stage again")
    found = {"rows": lines, "failures": steps.failures, "unfinished": steps.unfinished}
    return found | {"checkpoint": ours.name if ours else None}
