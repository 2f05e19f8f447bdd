"""Layers without weights: shapes and types of the layers that they stand for."""

from __future__ import annotations

import torch

from benchmarks.dummy_model import CONFIGS, SHAPES
from benchmarks.weightless import WeightlessConfig, WeightlessMethod
from resq_vllm.vllm_api import current_platform


class Layer(torch.nn.Module):
    """What vLLM's layers have that a method reads: nothing."""


def created(inputs: int, outputs: list[int]) -> tuple[WeightlessMethod, Layer]:
    method, layer = WeightlessMethod(), Layer()
    method.create_weights(layer, inputs, outputs, inputs, sum(outputs), torch.bfloat16)
    return method, layer


def test_linear_layer_has_no_parameters() -> None:
    method, layer = created(16, [8, 4, 4])
    assert list(layer.parameters()) == []
    y = method.apply(layer, torch.ones(3, 16, dtype=torch.bfloat16))
    assert torch.equal(y, torch.zeros(3, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_embedding_answers_rows_of_the_hidden_size() -> None:
    method, layer = created(16, [100])
    y = method.embedding(layer, torch.tensor([5, 7]))
    assert torch.equal(y, torch.zeros(2, 16))
    assert y.dtype == torch.bfloat16


def test_the_compiler_calls_the_layer_and_does_not_fold_it() -> None:
    method, layer = created(16, [8])
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph.code)
        return graph.forward

    torch.compile(lambda x: method.apply(layer, x) + 1, backend=backend, fullgraph=True)(torch.ones(2, 16))
    assert "resq_benchmarks.weightless" in graphs[0]
    x = torch.ones(2, 3)
    torch.library.opcheck(torch.ops.resq_benchmarks.weightless.default, (x, 5, torch.bfloat16))


def test_vllm_knows_the_method() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    described = CONFIGS["weightless"](SHAPES["1b"])["quantization_config"]
    config = get_quantization_config(described["quant_method"])
    assert config is WeightlessConfig
    assert current_platform.is_cpu() or current_platform.is_cuda()
    assert config.from_config(described).get_quant_method(Layer(), "model.norm") is None
