"""The workbench that all methods share: model, calibration tokens, evaluation texts, and statistics made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from offline.bases.bases import Bases, BasisKind, Site
from offline.calibrate.channels import LayerChannels, collect_channels
from offline.calibrate.collect import collect_moments
from offline.calibrate.moments import ModelMoments
from offline.evaluate.sequences import Sequences
from offline.models.adapter import ModelAdapter
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource

Progress = Callable[[str, int, int], None]


def silent(step: str, done: int, total: int) -> None:
    """No progress."""


@dataclass
class Lab:
    """One model on the bench.

    Attributes:
        runner: runs its layers.
        calibration: LongTensor [1, T] each.
        texts: evaluation sequences by name; the first is the one that decides.
        seed: of every random rotation.
        batch_tokens: of a calibration batch.
        progress: called (step, done, total).

    """

    runner: LayerRunner
    calibration: Sequence[torch.Tensor]
    texts: Mapping[str, Sequences]
    seed: int = 0
    batch_tokens: int = 4096
    progress: Progress = silent

    @property
    def source(self) -> ModelSource:
        return self.runner.source

    @property
    def adapter(self) -> ModelAdapter:
        return self.runner.adapter

    @cached_property
    def moments(self) -> ModelMoments:
        """Second moments of the float model's activations, norms folded."""
        return collect_moments(
            self.runner,
            self.calibration,
            lambda done, total: self.progress("second moments", done, total),
            batch_tokens=self.batch_tokens,
        )

    @cached_property
    def channels(self) -> list[LayerChannels]:
        """Magnitudes of every input channel of the model as published."""
        return collect_channels(
            self.runner,
            self.calibration,
            lambda done, total: self.progress("channel magnitudes", done, total),
            batch_tokens=self.batch_tokens,
        )

    def bases(self, kinds: Mapping[Site, BasisKind] | None = None) -> Bases:
        """PCA of the calibration activations, or the basis that ``kinds`` names per site."""
        return Bases.from_moments(self.moments, kinds, self.seed)
