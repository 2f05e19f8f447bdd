"""What a quantization method is: a transformed model, and per layer what is rounded to what.

A method never runs a layer itself. :meth:`Method.prepare` makes what concerns the whole model (bases, trained
rotations, smoothing factors); the :class:`Prepared` then describes one layer at a time, and
:mod:`offline.methods.run` quantizes and measures it. So every method shares calibration, quantizers and evaluation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from offline.models.source import ModelSource
from offline.quantize.activations import ActivationQuantizer, KVQuantizer
from offline.quantize.linear_weights import Unquantized, WeightQuantizer
from offline.quantize.lm_head import OutputHead
from resq_vllm.formats.metadata import SITES, SiteName

if TYPE_CHECKING:
    from offline.methods.lab import Lab

FLOAT_BITS = 16.0


@dataclass(frozen=True)
class SiteQuantization:
    """One linear site of one layer.

    Attributes:
        weights: turns a float weight into the values that its quantized form stands for.
        activation: what the site's input goes through.
        activation_bits: mean bits of an input element, what is kept high included.

    """

    weights: WeightQuantizer = field(default_factory=Unquantized)
    activation: ActivationQuantizer = field(default_factory=ActivationQuantizer)
    activation_bits: float = FLOAT_BITS


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer.

    Attributes:
        tensors: the transformed float layer, every tensor by full name.
        sites: what is rounded at each linear site.
        kv: what K and V go through.
        kv_bits: mean bits of a K or V element.

    """

    tensors: Mapping[str, torch.Tensor]
    sites: Mapping[SiteName, SiteQuantization]
    kv: KVQuantizer = field(default_factory=KVQuantizer)
    kv_bits: float = FLOAT_BITS


class Prepared(ABC):
    """A method applied to one model: what stands outside the decoder layers, and each layer's plan."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def embedding(self) -> torch.Tensor:
        """[vocab, d]; the model's own unless the method rotates the residual stream."""
        return self.source.embedding()

    def final_norm(self) -> torch.Tensor:
        """[d]."""
        return self.source.final_norm()

    def lm_head(self) -> torch.Tensor:
        """[vocab, d]."""
        return self.source.lm_head()

    def head(self, hessian: Callable[[], torch.Tensor]) -> OutputHead:
        """Final norm and lm_head, with what its input goes through; ``hessian`` makes its [d, d], where needed."""
        return OutputHead(self.final_norm(), self.lm_head())

    @abstractmethod
    def layer(self, index: int) -> LayerPlan:
        """The plan of decoder layer ``index``."""


class Method(ABC):
    """A named method with its settings.

    ``name``: as on the command line and in JSON rows; ``label``: for tables; ``source``: paper and section.
    """

    name: str
    label: str
    source: str

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Everything that decides the result besides model, texts and seed: fingerprinted, and shown in the row."""

    @abstractmethod
    def prepare(self, lab: Lab) -> Prepared:
        """Apply to the lab's model."""

    @property
    def samples(self) -> int | None:
        """Calibration sequences to use, None for all of the lab's."""
        return None

    @property
    def compensates(self) -> bool:
        """Whether weights make up for earlier losses (:mod:`offline.quantize.compensate`).

        If not, Hessians see unrounded activations and only the weights before are quantized (the papers' GPTQ).
        """
        return False


class FloatPrepared(Prepared):
    """The model as it is."""

    def layer(self, index: int) -> LayerPlan:
        return LayerPlan(self.source.layer_tensors(index), {site: SiteQuantization() for site in SITES})


class FloatModel(Method):
    """The reference row: nothing is quantized, arithmetic in float32 on the model's own weights."""

    name = "bf16"
    label = "16 bits"
    source = "the model as published"

    def settings(self) -> dict[str, object]:
        return {}

    def prepare(self, lab: Lab) -> Prepared:
        return FloatPrepared(lab.source)
