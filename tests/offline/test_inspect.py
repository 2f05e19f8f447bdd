"""``resq inspect``: every figure of a small checkpoint, counted by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from offline.inspect import CheckpointReport, inspect_checkpoint
from resq_vllm.errors import ResQError
from tests.offline.pack.tiny_checkpoint import EIGHT_BIT_HEAD, FOUR_BIT_HEAD, write_bases, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    write_checkpoint(folder)
    write_bases(folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> CheckpointReport:
    return inspect_checkpoint(folder)


def test_sites(report: CheckpointReport) -> None:
    sites = {site.site: site for site in report.sites}
    qkv_rows = 64 + 32 + 32
    assert (sites["qkv"].modules, sites["qkv"].activations) == (9, "4+8 per part")
    assert sites["qkv"].low_bytes == 3 * qkv_rows * 42 // 2
    assert sites["qkv"].high_bytes == 3 * qkv_rows * 6
    assert sites["qkv"].scale_bytes == 3 * qkv_rows * 2 * 4
    assert sites["qkv"].weight_bits == pytest.approx(4 * 7 / 8 + 8 / 8)
    assert (sites["o"].low_columns, sites["o"].high_columns, sites["o"].activations) == (56, 8, "8 per token")
    assert sites["gate_up"].weights == 3 * 2 * 96 * 48
    # One of three down_proj is left in 16 bits; the others have no high part.
    assert (sites["down"].modules, sites["down"].hadamard_groups) == (2, 8)
    assert (sites["down"].low_bytes, sites["down"].high_bytes) == (2 * 48 * 96 // 2, 0)
    assert sites["down"].weight_bits == 4.0


def test_sizes_add_up_to_the_file(report: CheckpointReport, folder: Path) -> None:
    assert report.embedding_bytes == report.lm_head_bytes == 64 * 48 * 4
    assert report.rotation_bytes == 2 * 16 * 16 * 4
    assert report.other_bytes == 7 * 48 * 4 + 48 * 96 * 4  # norms and the ignored down_proj
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert report.total_bytes == index["metadata"]["total_size"]
    linear = sum(site.low_bytes + site.high_bytes + site.scale_bytes for site in report.sites)
    assert report.average_bits == pytest.approx(8 * linear / sum(site.weights for site in report.sites))


def test_eight_bit_lm_head(report: CheckpointReport, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", metadata=EIGHT_BIT_HEAD)
    eight = inspect_checkpoint(tmp_path / "out")
    assert (report.lm_head_bits, eight.lm_head_bits) == (16, 8)
    assert (eight.lm_head_weights, eight.lm_head_bytes) == (64 * 48, 64 * 48 + 64 * 4)
    # Bits are those of the decoder layers' linears.
    assert (eight.average_bits, eight.other_bytes) == (report.average_bits, report.other_bytes)
    assert eight.total_bytes == report.total_bytes - report.lm_head_bytes + eight.lm_head_bytes
    out = io.StringIO()
    eight.print(Console(file=out, width=80))
    assert "lm_head (8 bit)" in out.getvalue()


def test_four_bit_lm_head(report: CheckpointReport, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", metadata=FOUR_BIT_HEAD)
    four = inspect_checkpoint(tmp_path / "out")
    assert (four.lm_head_bits, four.lm_head_weight_bits) == (4, 4.5)
    # 42 columns of half a byte and 6 of one, two scales a row.
    assert four.lm_head_bytes == 64 * (21 + 6) + 2 * 64 * 4
    assert (four.average_bits, four.other_bytes) == (report.average_bits, report.other_bytes)
    assert four.total_bytes == report.total_bytes - report.lm_head_bytes + four.lm_head_bytes
    out = io.StringIO()
    four.print(Console(file=out, width=80))
    assert "lm_head (4.5 bit)" in out.getvalue()


def test_kv_cache(report: CheckpointReport) -> None:
    assert (report.kv_bits, report.kv_high) == ([4, 8, 16], [2, 0, 0])
    # 14 low dims pad to 16 (8 bytes), 2 high to 4, two scales of 3 bytes; 16 bytes and one scale; 32 bytes of bf16.
    assert report.kv_bytes_per_token == 2 * (2 * (8 + 4 + 6) + 2 * (16 + 3) + 2 * 32)
    assert report.kv_bytes_per_token_bf16 == 2 * 3 * 2 * 32


def test_variance_captured(report: CheckpointReport) -> None:
    share = {v.site.split()[0]: v for v in report.variance}
    assert share["residual"].mean == pytest.approx(sum(range(43, 49)) / sum(range(1, 49)))
    assert share["key"].high == 2
    assert share["key"].lowest == share["key"].highest == pytest.approx(31 / 136)


def test_tables_fit_80_columns(report: CheckpointReport) -> None:
    out = io.StringIO()
    report.print(Console(file=out, width=80))
    text = out.getvalue()
    shown = ("42×4 + 6×8", "4 per block (8)", "KV bytes a token", "key (U_C)", "layers.2.mlp.down_proj")
    assert [part for part in shown if part not in text] == []
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 80


def test_json(report: CheckpointReport) -> None:
    value = json.loads(json.dumps(report.to_dict()))
    assert value["sites"][0]["weight_bits"] == pytest.approx(4.5)
    assert value["kv_bytes_per_token"] == report.kv_bytes_per_token


def test_checkpoint_without_bases_has_no_variance(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", "qwen2")
    report = inspect_checkpoint(tmp_path / "out")
    assert report.variance == []
    out = io.StringIO()
    report.print(Console(file=out, width=80))
    assert "variance" not in out.getvalue()


def test_damaged_bases_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "resq_basis.safetensors").write_bytes(b"junk")
    with pytest.raises(ResQError, match=r"resq_basis\.safetensors"):
        inspect_checkpoint(tmp_path / "out")
