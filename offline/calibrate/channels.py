"""Magnitudes of single channels: of every site's input, and of K's and V's dims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offline.models.adapter import SITE_LINEARS, ModelAdapter
from offline.models.layer import Observed, Observer
from offline.models.runner import LayerRunner, make_batches
from resq_vllm.formats.metadata import SITES, SiteName


@dataclass
class ChannelMagnitudes:
    """Per channel, float32 [K] but ``energy``.

    Attributes:
        largest: max |x_j| over tokens (SmoothQuant, QUIK).
        mean: max over calibration batches of mean |x_j| (L²QER).
        energy: Σ x_j² over tokens, float64 (the order of down_proj's channels).

    """

    largest: torch.Tensor
    mean: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> ChannelMagnitudes:
        zero = torch.zeros(columns, device=device)
        return cls(zero, zero.clone(), zero.double())

    def update(self, x: torch.Tensor) -> None:
        """One batch, x [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        magnitude = rows.abs()
        self.largest = torch.maximum(self.largest, magnitude.amax(0))
        self.mean = torch.maximum(self.mean, magnitude.mean(0))
        self.energy += rows.double().square().sum(0)


@dataclass
class LayerChannels:
    """One layer of the model as published: inputs of its linears, and K (after RoPE) and V by dim, all heads."""

    inputs: dict[SiteName, ChannelMagnitudes]
    key: ChannelMagnitudes
    value: ChannelMagnitudes

    @classmethod
    def empty(cls, adapter: ModelAdapter, device: torch.device) -> LayerChannels:
        """Zeros in the sizes of ``adapter``'s model."""
        widths = {site: adapter.linear_shape(SITE_LINEARS[site][0])[1] for site in SITES}
        return cls(
            {site: ChannelMagnitudes.empty(widths[site], device) for site in SITES},
            ChannelMagnitudes.empty(adapter.head_dim, device),
            ChannelMagnitudes.empty(adapter.head_dim, device),
        )

    def observers(self) -> dict[Observed, Observer]:
        """What :meth:`offline.models.layer.LoadedLayer.run` is to call."""
        observers: dict[Observed, Observer] = {site: self.inputs[site].update for site in SITES}
        return observers | {"key": self.key.update, "value": self.value.update}


def collect_channels(
    runner: LayerRunner,
    sequences: Sequence[torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
    batch_tokens: int = 4096,
) -> list[LayerChannels]:
    """Run ``sequences`` (LongTensor [1, T] each) through the model as published; one entry a layer.

    Memory: one layer and the hidden states. ``progress`` gets (layers done, layers).
    """
    hiddens = runner.embed(make_batches(sequences, batch_tokens))
    layers = []
    for index in range(runner.adapter.num_layers):
        found = LayerChannels.empty(runner.adapter, runner.device)
        runner.layer(index).run(hiddens, found.observers())
        layers.append(found)
        if progress is not None:
            progress(index + 1, runner.adapter.num_layers)
    return layers
