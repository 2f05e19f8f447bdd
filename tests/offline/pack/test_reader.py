"""The reader: what it gives of a good checkpoint, and the sentence for each kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline.pack.reader import ResQCheckpoint, is_resq_checkpoint
from offline.pack.tensors import TensorSpec
from offline.quantize.mixed import quantize_linear
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import linear_plan
from tests.offline.pack.tiny_checkpoint import EIGHT_BIT_HEAD, FOUR_BIT_HEAD, METADATA, orthogonal, write_checkpoint

SHARD = "model-00001-of-00001.safetensors"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "good"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bad"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 5000])
def test_reads_what_was_written(family: str, shard_bytes: int, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "out", family, shard_bytes)
    checkpoint = ResQCheckpoint(tmp_path / "out")
    assert is_resq_checkpoint(tmp_path / "out")
    assert checkpoint.metadata == METADATA
    assert len(checkpoint.linears) == 3 * 7 - 1
    for name, (linear, site) in checkpoint.linears.items():
        plan = linear_plan(site, linear.in_features, 16)
        expected = quantize_linear(model.get_submodule(name).weight.detach(), None, plan)
        assert torch.equal(checkpoint.linear(name).dequantize(), expected.dequantize()), name
    rotation = checkpoint.key_rotation(1)
    assert rotation is not None
    assert torch.equal(rotation, orthogonal(16, 1))
    assert checkpoint.key_rotation(2) is None
    assert torch.equal(checkpoint.tensor("model.norm.weight"), model.model.norm.weight)
    assert checkpoint.nbytes(f"{Q}.weight_low") == 64 * 42 // 2
    assert checkpoint.basis_path is None


def test_eight_bit_lm_head_is_a_packed_module(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "out", metadata=EIGHT_BIT_HEAD)
    checkpoint = ResQCheckpoint(tmp_path / "out")
    assert list(checkpoint.linears)[-1] == "lm_head"
    assert "lm_head.weight" not in checkpoint.specs
    assert checkpoint.specs["lm_head.weight_high"] == TensorSpec(torch.int8, (64, 48))
    assert checkpoint.specs["lm_head.weight_high_scale"] == TensorSpec(torch.float32, (64,))
    weight = model.lm_head.weight.detach()
    error = (checkpoint.linear("lm_head").dequantize() - weight).abs().amax() / weight.abs().amax()
    assert 0 < error < 1 / 127


def test_four_bit_lm_head_has_two_parts(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "out", metadata=FOUR_BIT_HEAD)
    checkpoint = ResQCheckpoint(tmp_path / "out")
    assert {name: spec for name, spec in checkpoint.specs.items() if name.startswith("lm_head.")} == {
        "lm_head.weight_low": TensorSpec(torch.uint8, (64, 21)),
        "lm_head.weight_low_scale": TensorSpec(torch.float32, (64,)),
        "lm_head.weight_high": TensorSpec(torch.int8, (64, 6)),
        "lm_head.weight_high_scale": TensorSpec(torch.float32, (64,)),
    }
    weight = model.lm_head.weight.detach()
    error = (checkpoint.linear("lm_head").dequantize() - weight).abs() / weight.abs().amax(1, keepdim=True)
    # A quarter of a step on average: of 15 values low, which the clip search brings closer together, of 255 high.
    assert 0.02 < float(error[:, :42].mean()) < 1 / 7 / 4
    assert 0.0005 < float(error[:, 42:].mean()) < 1 / 127 / 4


def test_float_lm_head_where_eight_bits_are_announced(damaged: Path) -> None:
    change_config(damaged, lambda c: c["quantization_config"].update(lm_head_bits=8, format_version=3))
    with pytest.raises(ResQError, match=r"tensor lm_head\.weight_high is missing; quantize the model again"):
        ResQCheckpoint(damaged)


def test_unknown_tensor_and_module_are_named(good: Path) -> None:
    checkpoint = ResQCheckpoint(good)
    with pytest.raises(ResQError, match="holds no tensor nothing"):
        checkpoint.tensor("nothing")
    with pytest.raises(ResQError, match="holds no packed linear module lm_head"):
        checkpoint.linear("lm_head")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ResQError, match=r"cannot read .*nowhere/config\.json"):
        ResQCheckpoint(tmp_path / "nowhere")


def test_config_that_is_not_json(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    with pytest.raises(ResQError, match=r"config\.json is not valid JSON"):
        ResQCheckpoint(damaged)


def test_config_that_is_no_object(damaged: Path) -> None:
    (damaged / "config.json").write_text("[]")
    with pytest.raises(ResQError, match=r"config\.json holds no JSON object"):
        ResQCheckpoint(damaged)


def test_plain_model(damaged: Path) -> None:
    change_config(damaged, lambda c: c.pop("quantization_config"))
    assert not is_resq_checkpoint(damaged)
    with pytest.raises(ResQError, match=r"config\.json has no quantization_config"):
        ResQCheckpoint(damaged)


def test_unknown_format_version(damaged: Path) -> None:
    change_config(damaged, lambda c: c["quantization_config"].update(format_version=99))
    with pytest.raises(ResQError, match=r"config\.json: format_version 99 is unknown to this release"):
        ResQCheckpoint(damaged)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "nonsense"}, r"transformers cannot read it .*nonsense"),
        ({"num_hidden_layers": "three"}, r"transformers cannot read it .*num_hidden_layers"),
        ({"model_type": "bert"}, r"kv_cache describes 3 layers but the model has 0"),
        ({"model_type": "vit"}, r"transformers cannot build a 'vit' causal language model"),
    ],
)
def test_config_that_is_not_the_models(change: dict[str, Any], sentence: str, damaged: Path) -> None:
    change_config(damaged, lambda c: c.update(change))
    with pytest.raises(ResQError, match=rf"config\.json: {sentence}"):
        ResQCheckpoint(damaged)


def test_site_width_that_is_not_the_models(damaged: Path) -> None:
    change_config(damaged, lambda c: c["quantization_config"]["sites"]["qkv"].update(low=40))
    with pytest.raises(ResQError, match=rf"config\.json: sites\.qkv has 40 \+ 6 columns but {Q} has 48 inputs"):
        ResQCheckpoint(damaged)


def test_number_of_kv_layers_that_is_not_the_models(damaged: Path) -> None:
    change_config(damaged, lambda c: c["quantization_config"]["kv_cache"].pop())
    with pytest.raises(ResQError, match="kv_cache describes 2 layers but the model has 3"):
        ResQCheckpoint(damaged)


def test_missing_tensor(damaged: Path) -> None:
    change_tensors(damaged, lambda t: t.pop(f"{Q}.weight_high"))
    with pytest.raises(ResQError, match=rf"tensor {Q}\.weight_high is missing"):
        ResQCheckpoint(damaged)


def test_missing_key_rotation(damaged: Path) -> None:
    change_tensors(damaged, lambda t: t.pop("model.layers.1.self_attn.attn.key_rotation"))
    with pytest.raises(ResQError, match=r"layers\.1\.self_attn\.attn\.key_rotation is missing"):
        ResQCheckpoint(damaged)


def test_unexpected_tensor(damaged: Path) -> None:
    change_tensors(damaged, lambda t: t.update({f"{Q}.weight": torch.ones(2)}))
    with pytest.raises(ResQError, match=rf"{SHARD}: tensor {Q}\.weight belongs to no module"):
        ResQCheckpoint(damaged)


def test_wrong_dtype(damaged: Path) -> None:
    name = f"{Q}.weight_low"
    change_tensors(damaged, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(ResQError, match=rf"{name} is int8 \[64, 21\] where config\.json asks for uint8 \[64, 21\]"):
        ResQCheckpoint(damaged)


def test_wrong_shape(damaged: Path) -> None:
    name = f"{Q}.weight_low_scale"
    change_tensors(damaged, lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(ResQError, match=rf"{name} is float32 \[63\] where config\.json asks for float32 \[64\]"):
        ResQCheckpoint(damaged)


def test_integer_embedding(damaged: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(damaged, lambda t: t.update({name: t[name].to(torch.int32)}))
    with pytest.raises(ResQError, match=rf"{name} is int32 .* asks for bfloat16, float16 or float32"):
        ResQCheckpoint(damaged)


def test_dtype_of_no_resq_tensor(damaged: Path) -> None:
    name = f"{Q}.weight_high"
    change_tensors(damaged, lambda t: t.update({name: t[name].to(torch.int16)}))
    with pytest.raises(ResQError, match=rf"{name} has the dtype I16"):
        ResQCheckpoint(damaged)


@pytest.mark.parametrize("kept", [0, 5, 300, -1], ids=["empty", "no header", "half a header", "last byte missing"])
def test_truncated_shard(kept: int, damaged: Path) -> None:
    data = (damaged / SHARD).read_bytes()
    (damaged / SHARD).write_bytes(data[:kept])
    with pytest.raises(ResQError, match=rf"{SHARD} is truncated or no safetensors file"):
        ResQCheckpoint(damaged)


def test_missing_shard(damaged: Path) -> None:
    (damaged / SHARD).unlink()
    with pytest.raises(ResQError, match=rf"{SHARD} is missing"):
        ResQCheckpoint(damaged)


def test_index_without_weight_map(damaged: Path) -> None:
    (damaged / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ResQError, match=r"index\.json lacks the field weight_map"):
        ResQCheckpoint(damaged)


def test_single_file_without_index_is_read(damaged: Path) -> None:
    (damaged / "model.safetensors.index.json").unlink()
    (damaged / SHARD).rename(damaged / "model.safetensors")
    assert ResQCheckpoint(damaged).metadata == METADATA
