"""What every quantization job has: the model, its calibration text, the work folder, and the card's perplexities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from offline.evaluate.perplexity import Perplexity
from offline.evaluate.sequences import Sequences
from offline.evaluate.streaming import streaming_perplexity
from offline.models.adapter import ModelAdapter
from offline.models.layer import LoadedLayer
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.workfolder import WorkFolder
from resq_vllm.formats.metadata import QuantizationMetadata


def step(index: int) -> str:
    """Name of a layer's finished step in the work folder."""
    return f"layer-{index:05d}"


class bar:  # noqa: N801 (used like a function)
    """A tqdm bar that is told (done, total)."""

    def __init__(self, description: str, total: int) -> None:
        self._bar: tqdm = tqdm(total=total, desc=description, unit="layer")

    def __enter__(self) -> Callable[[int, int], None]:
        return self._update

    def _update(self, done: int, total: int) -> None:
        self._bar.update(done - self._bar.n)

    def __exit__(self, *error: object) -> None:
        self._bar.close()


@dataclass
class Job(ABC):
    """One checkpoint in the making.

    Attributes:
        options: the user's.
        source: the model.
        metadata: of the checkpoint.
        runner: runs the model's layers.
        sequences: calibration tokens, LongTensor [1, T] each.
        text: held-out text for the model card, or None.
        fingerprint: of model and calibration tokens.
        work: where finished steps are kept.

    """

    options: QuantizeOptions
    source: ModelSource
    metadata: QuantizationMetadata
    runner: LayerRunner
    sequences: list[torch.Tensor]
    text: Sequences | None
    fingerprint: str
    work: WorkFolder

    @abstractmethod
    def all(self) -> None:
        """Calibrate, quantize, measure and publish, going on from the steps that the work folder holds."""

    @property
    def adapter(self) -> ModelAdapter:
        return self.source.adapter

    @property
    def batch_tokens(self) -> int:
        return self.options.batch_size * max(s.numel() for s in self.sequences)

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of a finished layer."""
        return self.work.load(step(index))

    def perplexities(
        self, top: dict[str, torch.Tensor], served: Callable[[int], LoadedLayer]
    ) -> tuple[Perplexity | None, Perplexity | None]:
        """Of the model and of the checkpoint on the held-out text, for the model card; None without a text.

        top: the checkpoint's embedding, final norm and lm_head; served: its layers in fake quantization.
        """
        if self.text is None:
            return None, None
        source, adapter = self.source, self.adapter
        with bar("(3/3) measuring", 2 * adapter.num_layers) as update:
            before = streaming_perplexity(
                self.runner,
                self.text,
                self.runner.layer,
                source.embedding(),
                source.final_norm(),
                source.lm_head(),
                update,
            )
            after = streaming_perplexity(
                self.runner,
                self.text,
                served,
                top[adapter.embedding],
                top[adapter.final_norm],
                top[adapter.lm_head],
                lambda done, layers: update(layers + done, 2 * layers),
            )
        print(f"perplexity {before.value:.3f} -> {after.value:.3f} on {after.tokens} tokens of the {after.dataset}")
        return before, after
