"""Adapters: names, shapes and biases equal transformers' own; bad configs are refused in one sentence."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig

from offline.models.adapter import LINEARS
from offline.models.registry import adapter_for
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import FAMILIES, SIZES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    adapter = adapter_for(model.config)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = adapter.model_shapes()
    for layer in range(adapter.num_layers):
        shapes |= adapter.layer_shapes(layer)
    assert shapes == found
    assert adapter.head_dim == 16
    assert adapter.heads_per_kv == 2
    assert adapter.has_qkv_bias == ("bias" in family or "qwen2" in family)


def test_sliding_window_by_layer() -> None:
    def windows(family: str) -> list[int | None]:
        model = tiny_model(family)
        model.config.architectures = [type(model).__name__]
        adapter = adapter_for(model.config)
        return [adapter.sliding_window(layer) for layer in range(adapter.num_layers)]

    assert windows("qwen2-window") == [None, 5, 5]
    assert windows("mistral-window") == [5, 5, 5]
    assert windows("qwen2") == windows("llama") == [None] * 3


def test_head_dim_defaults_to_hidden_over_heads_where_the_config_has_none() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    adapter = adapter_for(LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]))
    assert adapter.head_dim == 12
    assert set(LINEARS) == set(adapter.linear_paths)


def test_unsupported_architecture_is_named_with_the_supported_ones() -> None:
    with pytest.raises(ResQError, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen2ForCausalLM.*Qwen3ForCausalLM"):
        adapter_for(GPT2Config(architectures=["GPT2LMHeadModel"]))


def test_config_without_architectures() -> None:
    with pytest.raises(ResQError, match="architectures is missing"):
        adapter_for(LlamaConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ResQError, match=message):
        adapter_for(LlamaConfig(**(SIZES | changes), architectures=["LlamaForCausalLM"]))
