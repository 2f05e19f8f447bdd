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
from offline.pack.tensors import linear_from_tensors, linear_tensors
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.workfolder import WorkFolder
from offline.quantize.lm_head import OutputHead, quantize_lm_head
from resq_vllm.formats.metadata import LM_HEAD, QuantizationMetadata
from resq_vllm.formats.plan import linear_plan


def step(index: int) -> str:
    """Name of a layer's finished step in the work folder."""
    return f"layer-{index:05d}"


class bar:  # noqa: N801 (used like a function)
    """A tqdm bar that is told (done, total)."""

    def __init__(self, description: str, total: int, unit: str = "layer") -> None:
        self._bar: tqdm = tqdm(total=total, desc=description, unit=unit)

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

    @abstractmethod
    def embedding(self) -> torch.Tensor:
        """The checkpoint's, [vocab, d] in the model's dtype; read or made anew each time, not kept in memory."""

    @abstractmethod
    def head(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of final norm and lm_head; as :meth:`embedding`."""

    @property
    def adapter(self) -> ModelAdapter:
        return self.source.adapter

    @property
    def batch_tokens(self) -> int:
        return self.options.batch_size * max(s.numel() for s in self.sequences)

    def head_tensors(
        self, fused: Callable[[torch.Tensor, torch.dtype], torch.Tensor], hessian: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of lm_head: in the model's dtype, or packed.

        ``fused`` takes rows [n, d] of the model's own and a dtype, and returns what the checkpoint has in their place;
        ``hessian`` [d, d]: of lm_head's input, for GPTQ, which takes its memory; None: round to nearest.
        """
        table, site = self.source.lm_head(), self.metadata.lm_head_site
        if site is None:
            return {self.adapter.lm_head: fused(table, self.source.dtype)}
        # Four bits of 128,256 rows take minutes (GPTQ with a search for clips).
        with bar("(2/3) quantizing lm_head", len(table), "row") as update:
            packed = quantize_lm_head(table, site, hessian, lambda rows: fused(rows, torch.float32), update)
        return linear_tensors(packed, LM_HEAD)

    def served_head(self) -> OutputHead:
        """The checkpoint's final norm and lm_head as they will be served."""
        tensors, site = self.head(), self.metadata.lm_head_site
        norm = tensors[self.adapter.final_norm]
        if site is None:
            return OutputHead(norm, tensors[self.adapter.lm_head])
        plan = linear_plan(site, site.low + site.high, self.metadata.head_dim)
        rows = self.source.config.vocab_size
        return OutputHead.of_quantized(norm, linear_from_tensors(tensors.__getitem__, LM_HEAD, rows, site, plan))

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of a finished layer."""
        return self.work.load(step(index))

    def perplexities(self, served: Callable[[int], LoadedLayer]) -> tuple[Perplexity | None, Perplexity | None]:
        """Of the model and of the checkpoint on the held-out text, for the model card; None without a text.

        served: the checkpoint's layers in fake quantization.
        """
        if self.text is None:
            return None, None
        source, adapter = self.source, self.adapter
        with bar("(3/3) measuring", 2 * adapter.num_layers) as update:
            before = streaming_perplexity(
                self.runner,
                self.text,
                self.runner.layer,
                source.embedding,
                lambda: OutputHead(source.final_norm(), source.lm_head()),
                update,
            )
            after = streaming_perplexity(
                self.runner,
                self.text,
                served,
                self.embedding,
                self.served_head,
                lambda done, layers: update(layers + done, 2 * layers),
            )
        print(f"perplexity {before.value:.3f} -> {after.value:.3f} on {after.tokens} tokens of the {after.dataset}")
        return before, after
