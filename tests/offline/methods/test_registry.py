"""All methods at once: none changes the float model, each counts its bits, and names are unique."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from offline.methods.lab import Lab
from offline.methods.method import LayerPlan, Method, Prepared, SiteQuantization
from offline.methods.registry import MethodOptions, ablations, chosen_ablations, methods
from offline.methods.run import run_method
from offline.quantize.activations import ActivationQuantizer, KVQuantizer
from offline.quantize.lm_head import OutputHead
from resq_vllm.errors import ResQError
from tests.offline.methods.conftest import MakeLab

OPTIONS = MethodOptions(train_tokens=4096, lr=0.1)
ROWS = methods(OPTIONS)
EVERY = ROWS | ablations(OPTIONS)


class Unrounded(Method):
    """Another method's transforms without any rounding."""

    source = ""

    def __init__(self, method: Method) -> None:
        self.name = self.label = method.name
        self._method = method

    def settings(self) -> dict[str, object]:
        return {}

    def prepare(self, lab: Lab) -> Prepared:
        prepared = self._method.prepare(lab)
        rounded = prepared.layer

        def layer(index: int) -> LayerPlan:
            plan = rounded(index)
            sites = {
                site: SiteQuantization(activation=ActivationQuantizer(q.activation.transform))
                for site, q in plan.sites.items()
            }
            return LayerPlan(plan.tensors, sites, KVQuantizer(plan.kv.rotation))

        def head(hessian: Callable[[], torch.Tensor]) -> OutputHead:
            return OutputHead(prepared.final_norm(), prepared.lm_head())

        prepared.layer, prepared.head = layer, head  # type: ignore[method-assign]
        return prepared


@pytest.mark.parametrize("name", sorted(EVERY))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_float_function_is_unchanged(name: str, family: str, make_lab: MakeLab) -> None:
    lab = make_lab(family)
    plain = run_method(lab, ROWS["bf16"]).perplexity[""].value
    transformed = run_method(lab, Unrounded(EVERY[name])).perplexity[""].value
    assert transformed == pytest.approx(plain, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "weights", "activations", "kv"),
    [
        ("bf16", 16, 16, 16),
        ("rtn", 4, 4, 4),
        ("gptq", 4, 4, 4),
        ("smoothquant", 4, 4, 4),
        ("quarot", 4, 4, 4),
        ("spinquant", 4, 4, 4),
        # 6 of 48 hidden channels, 2 of 16 head dims and 12 of 96 FFN channels: an eighth everywhere.
        ("quik", 4.5, 4.5, 4.5),
    ],
)
def test_bits_are_counted(name: str, weights: float, activations: float, kv: float, make_lab: MakeLab) -> None:
    measured = run_method(make_lab(), ROWS[name])
    assert (measured.weight_bits, measured.activation_bits, measured.kv_bits) == pytest.approx(
        (weights, activations, kv)
    )


@pytest.mark.parametrize("name", ["resq", "resq-paper", "resq-trained", "resq-248", "quik"])
def test_mixed_precision_keeps_to_the_budget(name: str, make_lab: MakeLab) -> None:
    measured = run_method(make_lab(), ROWS[name])
    for bits in (measured.weight_bits, measured.activation_bits, measured.kv_bits):
        assert 4 <= bits <= 4.6


# Random weights and a vocabulary of 64: what 4 bits do is plain to see.
@pytest.mark.parametrize(("name", "change"), [("resq-lm8", 0.01), ("resq-lm4", 0.1)])
def test_quantized_head_is_felt_and_not_among_the_layers_bits(name: str, change: float, make_lab: MakeLab) -> None:
    lab = make_lab()
    plain, quantized = run_method(lab, ROWS["resq"]), run_method(lab, ROWS[name])
    assert (plain.weight_bits, plain.activation_bits) == (quantized.weight_bits, quantized.activation_bits)
    found, wanted = quantized.perplexity[""].value, plain.perplexity[""].value
    assert found != wanted
    assert found == pytest.approx(wanted, rel=change)


def test_corrections_count_as_weights(make_lab: MakeLab) -> None:
    lab = make_lab()
    measured = run_method(lab, replace(ROWS["lqer"], rank=2, group=16, max_tp=1))  # type: ignore[type-var]
    adapter = lab.adapter
    shapes = [adapter.linear_shape(n) for n in ("q", "k", "v", "o", "gate", "up", "down")]
    weights = sum(n * k for n, k in shapes)
    expected = (weights * (4 + 32 / 16) + sum(16 * 2 * (n + k) for n, k in shapes)) / weights
    assert measured.weight_bits == pytest.approx(expected)
    assert (measured.activation_bits, measured.kv_bits) == (8, 16)


def test_names_and_settings_identify_methods() -> None:
    assert [method.name for method in EVERY.values()] == list(EVERY)
    assert len({str(method.settings()) + type(method).__name__ for method in EVERY.values()}) == len(EVERY)
    assert all(method.label and method.source for method in EVERY.values())


def test_ablations_are_chosen_by_short_or_full_name() -> None:
    assert list(chosen_ablations(("no-ua", "resq-low-3"))) == ["resq-no-ua", "resq-low-3"]
    assert set(chosen_ablations(("all",))) == set(ablations())
    with pytest.raises(ResQError, match=r"--ablations: no-uz unknown; give all, or some of no-ua, no-ub"):
        chosen_ablations(("no-uz",))


def test_same_seed_gives_the_same_figures(make_lab: MakeLab) -> None:
    lab = make_lab()
    first, second = (run_method(lab, ROWS["resq"]).perplexity[""].value for _ in range(2))
    assert first == second
