"""lm-eval tasks: found by name, set, file and folder; run on models in torch; refused in one sentence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pytest

from offline.bundled import MODEL_DIR
from offline.evaluate.naive import load_naive_model
from offline.evaluate.reference_model import load_reference_model
from offline.evaluate.tasks import SETS, TaskSet, figure, load_tasks
from offline.models.tokenizer import load_tokenizer
from resq_vllm.errors import ResQError

DATA = Path(__file__).parent / "data"
TASK = DATA / "python_lines.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the task that may be changed."""
    return Path(shutil.copytree(DATA, tmp_path / "tasks"))


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    return load_tasks([str(TASK)])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_plain_model_knows_python_and_naive_rounding_forgets_some(tasks: TaskSet) -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    model = load_reference_model(MODEL_DIR)
    plain = tasks.run(model, tokenizer)["python_lines"]
    assert plain >= 0.9
    assert 0.25 < tasks.run(load_naive_model(MODEL_DIR), tokenizer)["python_lines"] < plain
    # Loaded tasks serve any number of models.
    assert tasks.run(model, tokenizer)["python_lines"] == plain


def test_limit_takes_the_first_documents(folder: Path) -> None:
    lines = (folder / "python_lines.jsonl").read_text().splitlines()
    wrong = lines[1].replace('"answer": 3', '"answer": 0')
    assert wrong != lines[1]
    (folder / "python_lines.jsonl").write_text("\n".join([lines[0], wrong, *lines[2:]]) + "\n")
    model, tokenizer = load_reference_model(MODEL_DIR), load_tokenizer(MODEL_DIR)
    assert load_tasks([str(folder / TASK.name)], limit=2).run(model, tokenizer) == {"python_lines": 0.5}


def test_digest_counts_content_and_not_place(tasks: TaskSet, folder: Path) -> None:
    path = folder / TASK.name
    assert load_tasks([str(path)]).digest() == tasks.digest()
    assert load_tasks([str(path)], limit=3).digest() != tasks.digest()
    settings = path.read_text()
    path.write_text(settings.replace('target_delimiter: ""', 'target_delimiter: " "'))
    assert load_tasks([str(path)]).digest() != tasks.digest()
    path.write_text(settings)
    documents = folder / "python_lines.jsonl"
    documents.write_text(documents.read_text().replace("sum of a and b", "sum of b and a"))
    assert load_tasks([str(path)]).digest() != tasks.digest()


def test_data_file_may_lie_in_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "python_lines.jsonl").rename(elsewhere / "python_lines.jsonl")
    monkeypatch.chdir(elsewhere)
    assert load_tasks(["../python_lines.yaml"]).names == ("python_lines",)


def test_folder_means_all_of_its_tasks(folder: Path) -> None:
    text = TASK.read_text().replace("task: python_lines", "task: second")
    (folder / "second.yaml").write_text(text)
    assert load_tasks([str(folder)]).names == ("python_lines", "second")


def test_local_group_is_reported_as_a_whole(folder: Path) -> None:
    (folder / "both.yaml").write_text(
        "group: both\ntask:\n  - python_lines\n  - second\naggregate_metric_list:\n  - metric: acc\n"
        "    aggregation: mean\n    weight_by_size: true\n"
    )
    (folder / "second.yaml").write_text(TASK.read_text().replace("task: python_lines", "task: second"))
    found = load_tasks([str(folder / "both.yaml")], limit=2)
    assert found.names == ("both",)
    assert found.run(load_reference_model(MODEL_DIR), load_tokenizer(MODEL_DIR))["both"] == 1


def test_unknown_task_lists_near_ones() -> None:
    with pytest.raises(ResQError, match=r"task arc_esay: unknown to lm_eval .*near it are .*arc_easy"):
        load_tasks(["arc_esay"])


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["paper", *SETS["paper"], "mmlu", "gsm8k"])
def test_task_of_the_hub_without_network_names_the_remedies(name: str) -> None:
    shown = SETS.get(name, (name,))[0]
    with pytest.raises(ResQError, match=rf"task {shown}: .*network.*HF_HOME.*PATH\.yaml"):
        load_tasks([name])


def test_bad_files_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (folder / "broken.yaml").write_text("task: [")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe")
    (folder / "nodata.yaml").write_text(TASK.read_text().replace("python_lines.jsonl", "absent.jsonl"))
    for path, word in (
        (tmp_path / "absent.yaml", "no such file"),
        (tmp_path / "empty", "no task file"),
        (folder / "broken.yaml", "cannot be loaded"),
        (folder / "binary.yaml", "cannot be read"),
        (folder / "nodata.yaml", "absent.jsonl"),
    ):
        with pytest.raises(ResQError, match=rf"task {path}: .*{word}"):
            load_tasks([str(path)])


def test_limit_of_zero_and_no_names_are_refused() -> None:
    with pytest.raises(ResQError, match="--task-limit is 0"):
        load_tasks([str(TASK)], limit=0)
    with pytest.raises(ResQError, match="names no task"):
        load_tasks([])


def test_missing_lm_eval_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ResQError, match=r"pip install 'resq-vllm\[eval\]'"):
        load_tasks(["arc_easy"])


@pytest.mark.parametrize(
    ("metrics", "value"),
    [
        ({"alias": "x", "acc,none": 0.5, "acc_norm,none": 0.25, "acc_stderr,none": 0.1}, 0.25),
        ({"acc,none": 0.5, "f1,none": 0.75}, 0.5),
        ({"exact_match,strict-match": 0.125, "exact_match,flexible-extract": 0.5}, 0.125),
    ],
)
def test_figure_of_a_task(metrics: dict[str, Any], value: float) -> None:
    assert figure("t", metrics) == value


def test_task_without_an_accuracy_is_refused() -> None:
    with pytest.raises(ResQError, match=r"task t: has none of the metrics .* \(but perplexity\)"):
        figure("t", {"alias": "t", "perplexity,none": 7.0})
