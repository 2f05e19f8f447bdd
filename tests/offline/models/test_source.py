"""Reading a model folder, and one sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline.models.source import ModelSource
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import save_tiny

Q_WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny("qwen2", tmp_path, shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path | str, *needles: str, read: bool = False) -> None:
    def attempt() -> None:
        source = ModelSource.open(folder)
        if read:
            source.layer_tensors(1)

    with pytest.raises(ResQError) as caught:
        attempt()
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_reads_what_was_saved(tmp_path: Path, shard_size: str) -> None:
    model = save_tiny("qwen2", tmp_path, shard_size=shard_size)
    source = ModelSource.open(tmp_path)
    state = model.state_dict()
    layer = source.layer_tensors(2)
    assert set(layer) == {name for name in state if name.startswith("model.layers.2.")}
    for name, value in layer.items():
        assert torch.equal(value, state[name])
    assert torch.equal(source.lm_head(), state["lm_head.weight"])
    assert torch.equal(source.final_norm(), state["model.norm.weight"])
    assert source.embedding(torch.float64).dtype == torch.float64
    assert source.dtype == torch.float32


def test_tied_lm_head_is_a_copy_of_the_embedding(llama: Path) -> None:
    source = ModelSource.open(llama)
    assert source.adapter.tied
    embedding, head = source.embedding(), source.lm_head()
    assert torch.equal(embedding, head)
    head.zero_()
    assert bool(source.embedding().any())


def test_tied_model_ignores_a_stale_lm_head(llama: Path) -> None:
    edit(llama, lambda t: t.update({"lm_head.weight": torch.zeros_like(t["model.embed_tokens.weight"])}))
    source = ModelSource.open(llama)
    assert torch.equal(source.lm_head(), source.embedding())


def test_rotary_tables_of_old_llamas_are_passed_over(llama: Path) -> None:
    edit(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in ModelSource.open(llama).layer_tensors(0)


def test_fingerprint_tells_models_apart_and_stays(tmp_path: Path) -> None:
    prints = set()
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        save_tiny("llama", tmp_path / name, seed)
        prints.add(ModelSource.open(tmp_path / name).fingerprint())
    assert len(prints) == 2


def test_folder_that_does_not_exist() -> None:
    refused("./no/such/folder", "no such folder")


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/such-a-model-is-not-cached", "nobody/such-a-model-is-not-cached", "Hugging Face Hub", "folder")


def test_file_instead_of_folder(llama: Path) -> None:
    refused(llama / "config.json", "is a file")


def test_no_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    refused(llama, "config.json: missing")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_that_is_no_json_object(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    refused(llama, "config.json", "download")


def test_config_with_an_unsupported_architecture(llama: Path) -> None:
    edit_config(llama, architectures=["MambaForCausalLM"])
    refused(llama, "config.json", "MambaForCausalLM", "LlamaForCausalLM")


def test_config_with_a_field_of_the_wrong_type(llama: Path) -> None:
    edit_config(llama, hidden_size="wide")
    refused(llama, "config.json", "hidden_size")


def test_config_with_heads_that_do_not_divide(llama: Path) -> None:
    edit_config(llama, num_key_value_heads=3)
    refused(llama, str(llama / "config.json"), "no multiple of 3")


def test_config_with_an_odd_head_dim(llama: Path) -> None:
    edit_config(llama, head_dim=15)
    refused(llama, "config.json", "head_dim", "even")


def test_model_already_quantized(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "gptq"})
    refused(llama, "already quantized (gptq)")


def test_weights_stored_as_integers(llama: Path) -> None:
    edit(llama, lambda t: t.update({Q_WEIGHT: t[Q_WEIGHT].to(torch.int8)}))
    refused(llama, Q_WEIGHT, "I8", read=True)


def test_pickled_weights_only(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, "pytorch_model.bin", "convert")


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, "neither model.safetensors nor")


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, f"shard {shard.name}", "missing")


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-200])
    refused(sharded, shard.name, "truncated")


def test_empty_shard(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"")
    refused(llama, "model.safetensors", "truncated")


def test_malformed_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(sharded, "model.safetensors.index.json", "not a safetensors index")


def test_index_that_leaves_the_folder(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q_WEIGHT] = "../model.safetensors"
    path.write_text(json.dumps(index))
    refused(sharded, "outside the folder")


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q_WEIGHT] = next(f for f in files if f != index["weight_map"][Q_WEIGHT])
    path.write_text(json.dumps(index))
    refused(sharded, Q_WEIGHT, "is not in it")


def test_missing_tensor(llama: Path) -> None:
    edit(llama, lambda t: t.pop(Q_WEIGHT))
    refused(llama, Q_WEIGHT, "missing")


def test_unknown_tensor_inside_a_layer(llama: Path) -> None:
    edit(llama, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    refused(llama, "model.layers.0.self_attn.q_norm.weight", "would change the model")


def test_shape_that_is_not_the_configs(llama: Path) -> None:
    edit(llama, lambda t: t.update({Q_WEIGHT: t[Q_WEIGHT][:-1].contiguous()}))
    refused(llama, Q_WEIGHT, "[63, 48]", "[64, 48]", read=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(llama: Path, bad: float) -> None:
    edit(llama, lambda t: t[Q_WEIGHT][3].fill_(bad))
    refused(llama, Q_WEIGHT, "NaN or Inf", read=True)
