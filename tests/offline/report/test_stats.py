"""``resq_stats.json``: written by ``resq quantize`` in every mode, read back, refused when damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from offline.evaluate.perplexity import Perplexity
from offline.report.stats import FILE_NAME, CheckpointStats, PerplexityRecord, read_stats
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SITES
from tests.offline.report.conftest import Quantize


def stats_of(folder: Path) -> CheckpointStats:
    stats = read_stats(folder)
    assert stats is not None
    return stats


def test_gptq_checkpoint_has_every_layer_and_site(checkpoint: Path) -> None:
    stats = stats_of(checkpoint)
    assert stats.tokens == 8 * 64
    assert [set(layer.sites) for layer in stats.layers] == [set(SITES)] * 3
    for layer in stats.layers:
        assert layer.key is not None
        assert layer.value is not None
        assert 0 < layer.key.after < 0.1
        for site in layer.sites.values():
            # GPTQ moves weights further than rounding does, for the sake of the output.
            assert site.weight.after > site.weight.rotated > 0
            assert 0 < site.output.after < 0.2


def test_perplexities_are_those_of_the_model_card(checkpoint: Path) -> None:
    stats, card = stats_of(checkpoint), (checkpoint / "README.md").read_text()
    for record in (stats.perplexity_before, stats.perplexity_after):
        assert record is not None
        assert f"{record.value:.3f}" in card
        assert record.sequences == 1


def test_rounding_to_nearest_streams_a_sample(quantize: Quantize) -> None:
    stats = stats_of(quantize("--rtn"))
    assert stats.tokens == 8 * 64
    for layer in stats.layers:
        for site in layer.sites.values():
            assert site.weight.after == site.weight.rotated > 0
            assert site.activation.after > 0


def test_what_is_not_quantized_is_not_measured(quantize: Quantize) -> None:
    ignored = "model.layers.1.mlp.down_proj,re:layers\\.0\\.self_attn\\.[qkv]_proj"
    stats = stats_of(quantize("--kv-bits", "16,4,8", "--ignore-layers", ignored, "--eval-windows", "0"))
    assert [layer.key is None for layer in stats.layers] == [True, False, False]
    assert set(stats.layers[0].sites) == {"o", "gate_up", "down"}
    assert set(stats.layers[1].sites) == {"qkv", "o", "gate_up"}
    assert stats.perplexity_before is None


def test_eight_bits_lose_less_than_four(checkpoint: Path, quantize: Quantize) -> None:
    four, eight = stats_of(checkpoint), stats_of(quantize("--low-bits", "8", "--kv-bits", "8"))
    for low, high in zip(four.layers, eight.layers, strict=True):
        assert high.sites["qkv"].activation.after < 0.05 * low.sites["qkv"].activation.after
        assert high.sites["down"].output.after < 0.05 * low.sites["down"].output.after


def test_infinite_perplexity_survives_the_file(tmp_path: Path) -> None:
    record = PerplexityRecord.of(Perplexity(math.inf, "text", "windows", 1, 63, 64))
    stats = CheckpointStats(tool_version="0", perplexity_before=record, perplexity_after=record)
    (tmp_path / FILE_NAME).write_text(json.dumps(stats.model_dump(mode="json"), allow_nan=False))
    assert read_stats(tmp_path) == stats


def test_folder_of_an_older_release_has_none(tmp_path: Path) -> None:
    assert read_stats(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "the file"),
        ('{"format_version": 2, "tool_version": "9"}', "format_version"),
        ('{"tool_version": "0", "colour": 1}', "colour"),
        ('{"tool_version": "0", "layers": [{"key": {"before": -1, "after": 0}}]}', "layers.0.key.before"),
    ],
)
def test_damaged_file_is_named(text: str, field: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ResQError, match=rf"resq_stats\.json: {field} is invalid"):
        read_stats(tmp_path)
