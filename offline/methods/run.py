"""Quantizes a model by one method and measures it, one decoder layer in memory at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from offline.evaluate.perplexity import Perplexity, perplexity
from offline.evaluate.streaming import sequence_nll
from offline.methods.assemble import WholeModel
from offline.methods.lab import Lab
from offline.methods.method import LayerPlan, Method
from offline.models.adapter import SITE_LINEARS
from offline.models.layer import LoadedLayer
from offline.models.runner import make_batches
from offline.quantize.activations import identity
from offline.quantize.compensate import LayerInputs
from offline.quantize.linear_weights import WeightQuantizer
from offline.quantize.lm_head import head_hessian
from resq_vllm.formats.metadata import SITES, SiteName


@dataclass(frozen=True)
class Measured:
    """A method on a model.

    Attributes:
        perplexity: by text, in the lab's order.
        weight_bits: mean over all weights of the decoder layers' linears; lm_head is not among them.
        activation_bits: mean over all input elements of those linears.
        kv_bits: mean over layers.
        seconds: wall clock, shared statistics not counted twice.

    """

    perplexity: dict[str, Perplexity]
    weight_bits: float
    activation_bits: float
    kv_bits: float
    seconds: float


class BitCount:
    """Running means of the bits of weights, linear inputs and KV."""

    def __init__(self) -> None:
        self._weights = self._weight_bits = self._inputs = self._input_bits = 0.0
        self._kv: list[float] = []

    def add(self, plan: LayerPlan, shapes: dict[SiteName, list[tuple[int, int]]]) -> None:
        """One layer: ``shapes`` [out, in] of each site's linears."""
        for site, linears in shapes.items():
            for rows, columns in linears:
                self._weights += rows * columns
                self._weight_bits += rows * columns * plan.sites[site].weights.bits(rows, columns)
                self._inputs += columns
                self._input_bits += columns * plan.sites[site].activation_bits
        self._kv.append(plan.kv_bits)

    @property
    def means(self) -> tuple[float, float, float]:
        """(weights, activations, KV)."""
        return (
            self._weight_bits / self._weights,
            self._input_bits / self._inputs,
            sum(self._kv) / len(self._kv),
        )


def run_method(lab: Lab, method: Method, whole: WholeModel | None = None) -> Measured:
    """Quantize layer by layer on the calibration tokens while the evaluation texts pass through the quantized layers.

    ``whole`` collects the finished layers, for those who want the model.
    Memory: one decoder layer in float32, the calibration activations and the texts' hidden states.
    """
    start = time.monotonic()
    prepared = method.prepare(lab)
    runner, adapter = lab.runner, lab.adapter
    embedding = prepared.embedding()
    batches = {name: make_batches([torch.tensor([ids]) for ids in text.ids]) for name, text in lab.texts.items()}
    hiddens = {name: runner.embed(ids, embedding) for name, ids in batches.items()}
    calibration = _Calibration(lab, method, embedding)
    shapes = {site: [adapter.linear_shape(name) for name in SITE_LINEARS[site]] for site in SITES}
    bits = BitCount()
    for index in range(adapter.num_layers):
        plan = prepared.layer(index)
        layer = runner.layer(index, plan.tensors)
        calibration.quantize(layer, plan)
        for states in hiddens.values():
            layer.run(states)
        bits.add(plan, shapes)
        if whole is not None:
            whole.keep(layer)
        lab.progress(method.name, index + 1, adapter.num_layers)
    head = prepared.head(lambda: calibration.head_hessian(prepared.final_norm()))
    if whole is not None:
        whole.finish(prepared.embedding(), head)
    results = {
        name: perplexity(sequence_nll(runner, batches[name], hiddens[name], head), text)
        for name, text in lab.texts.items()
    }
    return Measured(results, *bits.means, time.monotonic() - start)


class _Calibration:
    """The calibration activations on their way through the layers: of the quantized model, and of the float one."""

    def __init__(self, lab: Lab, method: Method, embedding: torch.Tensor) -> None:
        self._lab, self._method, self._embedding = lab, method, embedding
        self._hiddens: list[torch.Tensor] | None = None
        self._float_hiddens: list[torch.Tensor] = []

    def quantize(self, layer: LoadedLayer, plan: LayerPlan) -> None:
        """Replace every weight by its quantized values, in the order {q, k, v}, {o}, {gate, up}, {down} (method §3).

        Leaves ``layer`` with its roundings set, and the calibration activations behind it.
        """
        needed = any(site.weights.needs_hessian for site in plan.sites.values())
        compensates = needed and self._method.compensates
        if needed and self._hiddens is None:
            batches = make_batches(self._lab.calibration, self._lab.batch_tokens)
            self._hiddens = self._lab.runner.embed(batches, self._embedding)
            self._float_hiddens = list(self._hiddens) if compensates else []
        hiddens = self._hiddens or []
        _transform_activations(layer, plan)
        float_layer = None
        if compensates:
            float_layer = self._lab.runner.layer(layer.index, plan.tensors)
            _transform_activations(float_layer, plan)
            _round_activations(layer, plan)
        inputs = LayerInputs(layer, hiddens, float_layer, self._float_hiddens)
        del float_layer  # `inputs` lets it go where it has served
        for site in SITES:
            self._site(layer, site, plan.sites[site].weights, inputs)
        if not compensates:
            layer.run(hiddens)
        _round_activations(layer, plan)
        if compensates:
            layer.run(hiddens)
            inputs.finish()

    def head_hessian(self, norm: torch.Tensor) -> torch.Tensor:
        """Of lm_head's input behind the last layer and the final RMSNorm of weight ``norm`` [d]."""
        return head_hessian(self._lab.runner, norm, self._hiddens or [])

    def _site(self, layer: LoadedLayer, site: SiteName, weights: WeightQuantizer, inputs: LayerInputs) -> None:
        adapter = self._lab.adapter
        factor = None
        names = SITE_LINEARS[site]
        if weights.needs_hessian:
            found = inputs.site(site, adapter.linear_shape(names[0])[1])
            found.compensate([layer.weight(name) for name in names])
            factor = weights.factor(found.hessian, adapter.linear(layer.index, names[0]))
        for name in names:
            layer.set_weight(name, weights.quantize(layer.weight(name), factor, adapter.linear(layer.index, name)))


def _transform_activations(layer: LoadedLayer, plan: LayerPlan) -> None:
    for site in SITES:
        transform = plan.sites[site].activation.transform
        if transform is not identity:
            layer.transforms[site] = transform


def _round_activations(layer: LoadedLayer, plan: LayerPlan) -> None:
    for site in SITES:
        layer.transforms[site] = plan.sites[site].activation
    layer.attention_hook = plan.kv.hook()
