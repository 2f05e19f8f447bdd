"""Contenders of the throughput benchmark: engines, how each is started, and why one cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.dummy_model import Shape, write_models
from benchmarks.engine_process import EngineError, EngineProcess
from benchmarks.environment import vllm_environment
from benchmarks.gguf_model import write_gguf
from benchmarks.machine import usable_cores
from benchmarks.scenarios import Cell, Scenario, longest, most_at_once
from benchmarks.server import parse_kv_tokens
from resq_vllm.errors import ResQError

BASELINE = "bf16"
WEIGHTLESS = "weightless"
WARM_UP = Cell(Scenario("warm-up", 64, 8), 1)
_PAGE_TOKENS = 128


@dataclass(frozen=True)
class EngineContender:
    """How an engine is started.

    Attributes:
        model: key of benchmarks.dummy_model.CONFIGS, or "gguf".
        lm_head_bits: of its output layer, for the report.
        options: arguments of vLLM's LLM class on top of the common ones.
        environment: environment variables on top of benchmarks.environment.
        package: a package it needs beside vLLM, which may be installed in a folder apart.

    """

    model: str
    lm_head_bits: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    package: str | None = None


CONTENDERS: dict[str, EngineContender] = {
    BASELINE: EngineContender("bf16"),
    "resq": EngineContender("resq"),
    "resq-lm8": EngineContender("resq-lm8", lm_head_bits=8),
    "resq-lm4": EngineContender("resq-lm4", lm_head_bits=4),
    "fp8-kv": EngineContender("bf16", options={"kv_cache_dtype": "fp8"}),
    "w8a8": EngineContender("w8a8"),
    "w8a8-zentorch": EngineContender("w8a8", package="zentorch"),
    # Where the CPU has AMX, vLLM multiplies 4-bit weights with 8-bit activations unless it is told not to.
    "gptq": EngineContender("gptq"),
    "gptq-w4a16": EngineContender("gptq", environment={"VLLM_CPU_INT4_W4A8": "0"}),
    "awq": EngineContender("awq"),
    "awq-w4a16": EngineContender("awq", environment={"VLLM_CPU_INT4_W4A8": "0"}),
    "llama.cpp": EngineContender("gguf", lm_head_bits=6, package="llama_cpp"),
}


@dataclass(frozen=True)
class Setting:
    """What all engines of a run share.

    `folder`: models and logs; `packages`: folders of packages installed apart.
    """

    shape: Shape
    cells: tuple[Cell, ...]
    folder: Path
    packages: dict[str, Path]
    eager: bool = False

    @property
    def kv_cache_bytes(self) -> int:
        """As much as a bf16 cache needs for the cell with the most tokens: the same memory for every contender."""
        shape = self.shape
        per_token = 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        pages = -(-most_at_once(self.cells) // _PAGE_TOKENS) + max(cell.streams for cell in self.cells) + 8
        return pages * _PAGE_TOKENS * per_token


def engine_spec(contender: EngineContender, setting: Setting, model: Path, seed: int) -> dict[str, Any]:
    """What the child process is told (JSON)."""
    return {
        "model": str(model),
        "vocabulary": json.loads((model / "config.json").read_text())["vocab_size"],
        "seed": seed,
        "max_model_len": longest((*setting.cells, WARM_UP)) + 16,
        "max_num_seqs": max(cell.streams for cell in setting.cells),
        "kv_cache_bytes": setting.kv_cache_bytes,
        "options": {"enforce_eager": setting.eager} | contender.options,
        "warm_up": WARM_UP.to_dict(),
        "cells": [] if contender.model == WEIGHTLESS else [cell.to_dict() for cell in setting.cells],
        "imports": ["benchmarks.weightless"] if contender.model == WEIGHTLESS else [],
    }


def llama_spec(setting: Setting, model: Path, seed: int) -> dict[str, Any]:
    """The same for llama.cpp."""
    folder = setting.packages.get("llama_cpp")
    return {
        "model": str(model),
        "vocabulary": setting.shape.vocab_size,
        "seed": seed,
        "threads": len(usable_cores()),
        "python_path": [str(folder)] if folder else [],
        "warm_up": WARM_UP.to_dict(),
        "cells": [cell.to_dict() for cell in setting.cells],
    }


def require_package(contender: EngineContender, folder: Path | None) -> None:
    """Raise EngineError unless the package that a contender needs can be used here."""
    if contender.package is None:
        return
    cpuinfo = Path("/proc/cpuinfo")
    if contender.package == "zentorch" and "AuthenticAMD" not in (cpuinfo.read_text() if cpuinfo.exists() else ""):
        raise EngineError("vLLM takes zentorch's kernels on AMD CPUs only")
    places = [str(folder)] if folder else []
    command = f"import sys; sys.path += {places!r}; import {contender.package}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise EngineError(f"the package {contender.package} cannot be imported ({reason})")


def prepare(contender: EngineContender, setting: Setting) -> Path:
    """Write the contender's model below the setting's folder, unless it is there; returns its place.

    Raises:
        EngineError: when this release cannot make it.

    """
    if contender.model == "gguf":
        path = setting.folder / "model.gguf"
        if not path.exists():
            write_gguf(path, setting.shape)
        return path
    folder = setting.folder / "models"
    if not (folder / contender.model).exists():
        try:
            write_models(folder, setting.shape, [contender.model])
        except ResQError as error:
            raise EngineError(str(error)) from error
    return folder / contender.model


def _environment(contender: EngineContender, setting: Setting) -> dict[str, str]:
    environment = vllm_environment(contender.environment)
    # The engine must speak of its KV cache, whatever the caller's shell says.
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    folder = setting.packages.get(contender.package or "")
    paths = [os.getcwd(), *([str(folder)] if folder else []), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def start_engine(name: str, contender: EngineContender, setting: Setting, seed: int) -> EngineProcess:
    """A process with one contender.

    Raises:
        EngineError: when this release cannot make its model.

    """
    model = prepare(contender, setting)
    llama = contender.model == "gguf"
    spec = llama_spec(setting, model, seed) if llama else engine_spec(contender, setting, model, seed)
    module = "benchmarks.llama_child" if llama else "benchmarks.engine_child"
    return EngineProcess(_command(module), spec, _environment(contender, setting), setting.folder / name)


def _command(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _one_pass(engine: EngineProcess, contender: EngineContender, setting: Setting) -> dict[str, Any]:
    measured = engine.one_pass()
    return measured | {
        "kv_tokens": _llama_kv_tokens(setting) if contender.model == "gguf" else parse_kv_tokens(engine.text)
    }


def run_engine(name: str, contender: EngineContender, setting: Setting, seed: int) -> dict[str, Any]:
    """One process: all cells of one contender. Returns {"cells": {key: figures}, "loaded_gib", "rss_gib", "kv_tokens"}:
    memory that was written until after the warm-up, freed memory given back, and all resident memory at the end.

    Raises:
        EngineError: when the contender cannot run here.

    """
    with start_engine(name, contender, setting, seed) as engine:
        return _one_pass(engine, contender, setting)


class Together:
    """Engines that stay loaded between their turns, for a machine whose speed drifts while one starts."""

    # vLLM's processes look for work for a second after the last of it, and OpenMP's threads for milliseconds.
    quiet_seconds = 2.0

    def __init__(self) -> None:
        self._engines: dict[str, EngineProcess] = {}

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close(patience=0.0)

    def run(self, name: str, contender: EngineContender, setting: Setting, seed: int) -> dict[str, Any]:
        """run_engine in the contender's process, which is started at its first turn. Raises EngineError as it does."""
        if name not in self._engines:
            self._engines[name] = start_engine(name, contender, setting, seed)
        time.sleep(self.quiet_seconds)
        return _one_pass(self._engines[name], contender, setting)


def _llama_kv_tokens(setting: Setting) -> int:
    """Its cache is float16 (two bytes, as bf16) without pages: computed, as it reports none."""
    shape = setting.shape
    return setting.kv_cache_bytes // (4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim)


def weightless_engine_gib(setting: Setting) -> float:
    """Memory of an engine around the same model without weights: what is not weights in the others.

    Sizes, layers, requests and KV cache are theirs: vLLM fills the cache with zeros, compiles the layers and runs a
    full batch at its start, and what that leaves in the process is counted in every engine.

    Raises:
        EngineError: when it does not run.

    """
    return float(run_engine(WEIGHTLESS, EngineContender(WEIGHTLESS), setting, 0)["loaded_gib"])
