"""Random models on the bench: small enough that every method runs in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from offline.evaluate.sequences import Sequences
from offline.methods.lab import Lab
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from tests.offline.models.tiny import random_sequences, save_tiny

MakeLab = Callable[..., Lab]


@pytest.fixture(scope="session")
def make_lab(tmp_path_factory: pytest.TempPathFactory) -> MakeLab:
    """A lab by model family; the same one for the same family."""
    made: dict[str, Lab] = {}

    def make(family: str = "llama") -> Lab:
        if family not in made:
            folder: Path = tmp_path_factory.mktemp(family)
            save_tiny(family, folder)
            ids = tuple(tuple(s[0].tolist()) for s in random_sequences([24, 17, 24], seed=1))
            texts = {"": Sequences("random", "texts", ids, 24)}
            made[family] = Lab(LayerRunner(ModelSource.open(str(folder))), random_sequences([32] * 12, seed=2), texts)
        return made[family]

    return make
