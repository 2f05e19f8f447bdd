"""Tiny checkpoints, quantized once a session by the product itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offline.cli import app
from tests.offline.pipeline.conftest import tiny_llama

Quantize = Callable[..., Path]


@pytest.fixture(scope="session")
def source_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def quantize(source_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Quantize the tiny model with further flags, once for the same flags; returns the checkpoint."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*flags: str) -> Path:
        if flags not in made:
            output = tmp_path_factory.mktemp("checkpoints") / "tiny-resq"
            quick = ["--nsamples", "8", "--seqlen", "64", "--eval-windows", "1"]
            app(["quantize", str(source_model), "-o", str(output), *quick, *flags], standalone_mode=False)
            made[flags] = output
        return made[flags]

    return make


@pytest.fixture(scope="session")
def checkpoint(quantize: Quantize) -> Path:
    return quantize()
