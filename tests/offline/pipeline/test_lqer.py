"""``resq quantize --method lqer`` and ``l2qer`` from end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from offline.cli import app
from offline.evaluate import evaluate_perplexity
from offline.inspect import inspect_checkpoint
from offline.models.llama import LlamaAdapter
from offline.models.source import ModelSource
from offline.pack.reader import ResQCheckpoint
from offline.pipeline.lqer import LQERJob, weight_group
from resq_vllm.errors import ResQError

Flags = Callable[..., list[str]]


def run(arguments: list[str]) -> None:
    if app(arguments, standalone_mode=False) == 130:
        raise KeyboardInterrupt


def test_checkpoint_is_complete(tiny_model: Path, flags: Flags, tmp_path: Path) -> None:
    run(flags(tiny_model, "--method", "l2qer", "--rank", "8"))
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "README.md", "LICENSE", "tokenizer.json", "resq_stats.json"} <= names
    assert "resq_basis.safetensors" not in names
    assert not (tmp_path / "out.resq-work").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    checkpoint = ResQCheckpoint(out)
    metadata = checkpoint.metadata
    for site in metadata.sites.values():
        assert (site.high, site.act_low_bits, site.scales, site.low_rank) == (0, 8, "token", 8)
        assert site.hadamard_groups == 0
    # 64 inputs; o's are split by up to 4 ranks, down's 96 by up to 4.
    assert [metadata.sites[s].weight_group for s in ("qkv", "o", "gate_up", "down")] == [64, 16, 64, 24]
    assert [layer.low_bits for layer in metadata.kv_cache] == [16, 16, 16]
    assert metadata.recipe["method"] == "L²QER"
    assert not any("key_rotation" in name for name in checkpoint.specs)
    assert checkpoint.tensor("model.layers.0.mlp.down_proj.low_rank_a").dtype == torch.bfloat16
    card = (out / "README.md").read_text()
    assert "L²QER" in card
    assert "2402.02446" in card
    assert "a 16-bit KV cache" in card


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_card_and_whole_model_reference_agree(
    family: str, tiny_models: dict[str, Path], flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags(tiny_models[family], "--method", "l2qer"))
    after = float(capsys.readouterr().out.split("->")[1].split()[0])
    assert evaluate_perplexity(tmp_path / "out", limit=1, progress=False).value == pytest.approx(after, rel=2e-3)


@pytest.mark.parametrize("method", ["lqer", "l2qer"])
def test_full_rank_restores_the_model(tiny_model: Path, flags: Flags, tmp_path: Path, method: str) -> None:
    run(flags(tiny_model, "--method", method, "--rank", "64", "--eval-windows", "0"))
    source, checkpoint = ModelSource.open(tiny_model), ResQCheckpoint(tmp_path / "out")
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        found, original = checkpoint.linear(module).dequantize(), source.tensor(f"{module}.weight").float()
        # A and B are stored in bfloat16.
        torch.testing.assert_close(found, original, rtol=0, atol=0.01 * float(original.abs().max()))


def test_calibration_decides_what_the_correction_keeps(tiny_model: Path, flags: Flags, tmp_path: Path) -> None:
    for method in ("lqer", "l2qer"):
        run(flags(tiny_model, "--method", method, "--rank", "4", "--eval-windows", "0", output=method))
    plain, weighted = (ResQCheckpoint(tmp_path / name) for name in ("lqer", "l2qer"))
    module = "model.layers.0.mlp.up_proj"
    assert torch.equal(plain.linear(module).low, weighted.linear(module).low)
    assert not torch.allclose(plain.linear(module).dequantize(), weighted.linear(module).dequantize())
    assert "dataset" not in plain.metadata.recipe
    assert weighted.metadata.recipe["dataset"] == "bundled"


def test_packed_cache_and_ignored_layers_on_request(tiny_model: Path, flags: Flags, tmp_path: Path) -> None:
    ignored = "model.layers.1.mlp.down_proj"
    run(flags(tiny_model, "--method", "lqer", "--kv-bits", "4,16,8", "--ignore-layers", ignored, "--rank", "2"))
    checkpoint = ResQCheckpoint(tmp_path / "out")
    assert [(kv.low_bits, kv.high) for kv in checkpoint.metadata.kv_cache] == [(4, 0), (16, 0), (8, 0)]
    rotation = checkpoint.key_rotation(0)
    assert rotation is not None
    assert torch.equal(rotation, torch.eye(16))
    assert torch.equal(checkpoint.tensor(f"{ignored}.weight"), ModelSource.open(tiny_model).tensor(f"{ignored}.weight"))
    assert evaluate_perplexity(tmp_path / "out", limit=1, progress=False).value > 0


def test_rank_0_is_round_to_nearest_in_groups(tiny_model: Path, flags: Flags, tmp_path: Path) -> None:
    run(flags(tiny_model, "--method", "lqer", "--rank", "0", "--weight-group", "32"))
    checkpoint = ResQCheckpoint(tmp_path / "out")
    assert not any("low_rank" in name for name in checkpoint.specs)
    assert checkpoint.metadata.sites["qkv"].weight_group == 32
    assert checkpoint.specs["model.layers.0.self_attn.q_proj.weight_low_scale"].shape == (64, 2)


def test_inspect_counts_the_corrections(tiny_model: Path, flags: Flags, tmp_path: Path) -> None:
    run(flags(tiny_model, "--method", "lqer", "--rank", "4", "--eval-windows", "0"))
    report = inspect_checkpoint(tmp_path / "out")
    down = next(site for site in report.sites if site.site == "down")
    assert (down.low_rank, down.weight_group) == (4, 24)
    assert down.correction_bytes == 3 * 2 * 4 * (96 + 64)
    assert down.scale_bytes == 3 * 64 * 4 * 4
    assert report.average_bits == pytest.approx(
        8 * sum(site.bytes for site in report.sites) / sum(site.weights for site in report.sites)
    )


def test_interrupted_run_resumes_to_the_same_bytes(
    tiny_model: Path, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LQERJob.layer

    def interrupt(self: LQERJob, index: int, scales: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index, scales)

    with monkeypatch.context() as patch:
        patch.setattr(LQERJob, "layer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(flags(tiny_model, "--method", "l2qer"))
    assert (tmp_path / "out.resq-work" / "layer-00000.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr("offline.pipeline.lqer.collect_channels", None)  # what was calibrated is not done again
        run(flags(tiny_model, "--method", "l2qer", "--resume"))
    run(flags(tiny_model, "--method", "l2qer", output="whole"))
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()


def test_resume_with_another_method_is_refused(tiny_model: Path, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LQERJob, "layer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(flags(tiny_model, "--method", "lqer"))
    with pytest.raises(ResQError, match="belongs to a run with another method"):
        run(flags(tiny_model, "--method", "l2qer", "--resume"))


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--method", "lqer", "--high-fraction", "0.25"], "--high-fraction belongs to --method resq"),
        (["--method", "l2qer", "--rtn"], "--rtn belongs to --method resq; leave it out with --method l2qer"),
        (["--rank", "16"], "--rank belongs to --method lqer and l2qer; leave it out with --method resq"),
        (["--method", "lqer", "--rank", "-1"], "--rank: .*greater than or equal to 0"),
        (["--method", "lqer", "--weight-group", "0"], "--weight-group: .*greater than or equal to 1"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    tiny_model: Path, flags: Flags, tmp_path: Path, extra: list[str], sentence: str
) -> None:
    with pytest.raises(ResQError, match=sentence):
        run(flags(tiny_model, *extra))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("heads", "hidden", "ffn", "asked", "max_tp", "groups"),
    [
        (32, 4096, 14336, 128, 8, (128, 128, 128, 128)),
        (6, 192, 512, 128, 8, (96, 96, 96, 128)),
        (6, 192, 512, 128, 1, (96, 96, 96, 128)),
        (16, 1024, 1088, 128, 16, (128, 64, 128, 68)),
        (28, 3584, 18944, 128, 8, (128, 128, 128, 128)),
    ],
)
def test_group_divides_what_every_rank_gets(
    heads: int, hidden: int, ffn: int, asked: int, max_tp: int, groups: tuple[int, ...]
) -> None:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=1, vocab_size=32
    )
    adapter = LlamaAdapter(config)
    assert tuple(weight_group(adapter, site, asked, max_tp) for site in ("qkv", "o", "gate_up", "down")) == groups
