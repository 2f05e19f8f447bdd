"""The writer: shards, index, and nothing half-written whatever happens."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offline.pack import writer as module
from offline.pack.writer import CheckpointWriter, check_free
from resq_vllm.errors import ResQError

ROOT = Path(__file__).resolve().parents[3]


def tensors(count: int, start: int = 0) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((256,), float(i)) for i in range(start, start + count)}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_and_index(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with CheckpointWriter(out, max_shard_bytes=2500) as writer:
        for i in range(5):
            writer.add(tensors(1, i))
        writer.write_json("config.json", {"a": "é"})
        assert writer.finalise() == out
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert leftovers(out) == ["config.json", *names, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    assert [index["weight_map"][f"t{i}"] for i in range(5)] == [names[0], names[0], names[1], names[1], names[2]]
    for i in range(5):
        assert torch.equal(load_file(out / index["weight_map"][f"t{i}"])[f"t{i}"], tensors(1, i)[f"t{i}"])
    assert leftovers(tmp_path / "deep") == ["out"]


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=10) as writer:
        writer.add(tensors(2))
        writer.finalise()
    assert len(list((tmp_path / "out").glob("model-*-of-00002.safetensors"))) == 2


def test_single_shard_is_listed_too_and_the_bases_are_not(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add(tensors(1))
        writer.write_tensors("resq_basis.safetensors", {"key": torch.eye(2)}, {"kind": "x"})
        writer.finalise()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add({"a": whole[:4], "b": whole[2:], "c": whole.view(2, 4).T, "tied": whole, "tied too": whole})
        writer.finalise()
    stored = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert torch.equal(stored["tied"], stored["tied too"])
    assert stored["b"].tolist() == [2, 3, 4, 5, 6, 7]
    assert stored["c"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_files_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add(tensors(1))
        writer.finalise()
    (tmp_path / "new").touch()
    usual = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {usual}


def test_existing_output_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for call in (lambda: CheckpointWriter(tmp_path / "out"), lambda: check_free(tmp_path / "out")):
        with pytest.raises(ResQError, match=r"output folder .*out exists already"):
            call()
    assert leftovers(tmp_path) == ["out"]


def test_output_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add(tensors(1))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").touch()
        with pytest.raises(ResQError, match="exists already"):
            writer.finalise()
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(tmp_path / "out") == ["other"]


def test_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out", max_shard_bytes=10) as writer:
            writer.add(tensors(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert leftovers(tmp_path) == []


def test_killed_in_the_middle_leaves_no_output_folder(tmp_path: Path) -> None:
    script = (
        "import sys, time, torch; from pathlib import Path; from offline.pack.writer import CheckpointWriter\n"
        "w = CheckpointWriter(Path(sys.argv[1]), max_shard_bytes=10)\n"
        "w.add({'a': torch.ones(9), 'b': torch.ones(9)}); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = leftovers(tmp_path)
    assert left.startswith("out.partial-")
    with CheckpointWriter(tmp_path / "out") as writer:  # what is left does not stand in the way
        writer.finalise()
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_disk_full_is_one_sentence_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = save_file, iter([None, error])

    def fails_at_the_second_shard(*args: Any, **kwargs: Any) -> None:
        raised = next(calls)
        if raised is not None:
            raise raised
        real(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", fails_at_the_second_shard)
    with (
        pytest.raises(ResQError, match=r"^no space left on the disk of .*; the partial output was removed: free some"),
        CheckpointWriter(tmp_path / "out", max_shard_bytes=10) as writer,
    ):
        writer.add(tensors(4))
    assert leftovers(tmp_path) == []


def test_other_write_error_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ResQError, match=r"^cannot write to .*the partial output was removed"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        writer.copy(tmp_path / "no such file")
    assert leftovers(tmp_path) == []


def test_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResQError, match=r"cannot write to .*file"):
        CheckpointWriter(tmp_path / "file" / "out")


def test_tensor_name_given_twice_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add(tensors(1))
        with pytest.raises(ResQError, match="tensor t0 was written twice"):
            writer.add(tensors(1))


def test_shard_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ResQError, match="max_shard_bytes is 0"):
        CheckpointWriter(tmp_path / "out", max_shard_bytes=0)
    assert leftovers(tmp_path) == []


def test_relative_output_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with CheckpointWriter(Path("out")) as writer:
        os.chdir(tmp_path / "elsewhere")
        writer.finalise()
    assert (tmp_path / "out").is_dir()
