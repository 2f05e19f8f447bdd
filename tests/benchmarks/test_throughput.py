"""The throughput benchmark around `vllm bench throughput`: its models, its command, its report."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import throughput
from benchmarks.dummy_model import SHAPES, write_models
from benchmarks.pairs import Comparison
from resq_vllm.formats.metadata import QuantizationMetadata

WORK = throughput.Workload("decode", 32, 128, 16)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_models_differ_in_nothing_but_the_quantization(tmp_path: Path, shape: str) -> None:
    models = write_models(tmp_path, SHAPES[shape])
    bf16, resq = (json.loads((models[name] / "config.json").read_text()) for name in ("bf16", "resq"))
    metadata = QuantizationMetadata.from_dict(resq.pop("quantization_config"))
    assert resq == bf16
    assert bf16["hidden_size"] == SHAPES[shape].hidden_size
    assert metadata.sites["qkv"].low + metadata.sites["qkv"].high == SHAPES[shape].hidden_size
    assert len(metadata.kv_cache) == SHAPES[shape].num_hidden_layers
    assert len(AutoTokenizer.from_pretrained(models["resq"])) <= bf16["vocab_size"]


def test_command_asks_for_random_weights_and_the_workload(tmp_path: Path) -> None:
    command = throughput.bench_command(tmp_path / "resq", WORK, tmp_path / "answer.json")
    pairs = dict(itertools.pairwise(command))
    assert pairs["--load-format"] == "dummy"
    assert pairs["--random-input-len"] == "32"
    assert pairs["--random-output-len"] == "128"
    assert pairs["--num-prompts"] == "16"
    assert pairs["--output-json"] == str(tmp_path / "answer.json")


def test_failing_vllm_is_a_sentence_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "import sys; print('loading'); sys.exit('no such model')"]
    monkeypatch.setattr(throughput, "bench_command", lambda *_: failing)
    with pytest.raises(throughput.BenchmarkError, match=r"of resq failed; its last lines are:\nloading\nno such model"):
        throughput.tokens_per_second(tmp_path / "resq", WORK, tmp_path)


def test_rate_is_what_vllm_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = "import json, sys; json.dump({'tokens_per_second': 123.5}, open(sys.argv[1], 'w'))"
    monkeypatch.setattr(throughput, "bench_command", lambda _, __, answer: [sys.executable, "-c", writes, str(answer)])
    assert throughput.tokens_per_second(tmp_path / "resq", WORK, tmp_path) == 123.5


def test_answer_of_an_earlier_process_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer.json").write_text('{"tokens_per_second": 9.0}')
    monkeypatch.setattr(throughput, "bench_command", lambda *_: [sys.executable, "-c", "pass"])
    with pytest.raises(throughput.BenchmarkError):
        throughput.tokens_per_second(tmp_path / "resq", WORK, tmp_path)


def test_report_holds_machine_date_and_rows(tmp_path: Path) -> None:
    measured = Comparison("bf16", {"bf16": [100.0, 50.0], "resq": [150.0, 75.0]})
    rows = [throughput.row("small", WORK, measured)]
    throughput.write_report(tmp_path / "results" / "t.json", rows)
    report = json.loads((tmp_path / "results" / "t.json").read_text())
    assert set(report) == {"machine", "date", "rows"}
    assert report["rows"][0]["tokens_per_second"]["ratio"]["resq"] == 1.5
    assert report["rows"][0]["prompt_tokens"] == 32
    assert throughput.table(rows).row_count == 1
