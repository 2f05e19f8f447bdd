"""A quantization that was killed goes on with --resume and gives the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offline.calibrate.moments import ModelMoments
from offline.cli import app
from offline.pipeline.layers import LayerQuantizer
from resq_vllm.errors import ResQError

Flags = Callable[..., list[str]]


def run(arguments: list[str]) -> None:
    code = app(arguments, standalone_mode=False)
    if code == 130:
        raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.fixture
def interrupted(tiny_model: Path, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tmp_path with the work folder of a run that was interrupted in its second layer."""
    original = LayerQuantizer.quantize

    def interrupt(self: LayerQuantizer, index: int, *rest: object) -> object:
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "quantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(flags(tiny_model))
    assert (tmp_path / "out.resq-work" / "layer-00000.safetensors").exists()
    assert not (tmp_path / "out").exists()
    return tmp_path


def test_interrupted_run_resumes_to_the_same_bytes(interrupted: Path, tiny_model: Path, flags: Flags) -> None:
    run(flags(tiny_model, "--resume"))
    run(flags(tiny_model, output="whole"))
    assert contents(interrupted / "out") == contents(interrupted / "whole")
    assert not (interrupted / "out.resq-work").exists()


def test_killed_process_resumes_to_the_same_bytes(tiny_model: Path, flags: Flags, tmp_path: Path) -> None:
    many = ["--nsamples", "48", "--batch-size", "1"]
    command = [sys.executable, "-m", "offline.cli", *flags(tiny_model, *many)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3])
    first = tmp_path / "out.resq-work" / "layer-00000.safetensors"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    run(flags(tiny_model, *many, "--resume"))
    run(flags(tiny_model, *many, output="whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interrupted_calibration_resumes_to_the_same_bytes(
    tiny_model: Path, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ModelMoments.save

    def save_and_stop(self: ModelMoments, path: Path) -> None:
        original(self, path)
        if self.layers_done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelMoments, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(flags(tiny_model))
    run(flags(tiny_model, "--resume"))
    run(flags(tiny_model, output="whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_head_that_gptq_rounds_sees_the_same_activations_again(
    tiny_model: Path, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = ("--lm-head-bits", "4", "--eval-windows", "0")

    def interrupt(self: object, *rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("offline.pipeline.run._ResQJob.save_head", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(flags(tiny_model, *four))
    steps = {path.name for path in (tmp_path / "out.resq-work").iterdir()}
    assert "layer-00002.safetensors" in steps
    assert "lm_head.safetensors" not in steps
    run(flags(tiny_model, *four, "--resume"))
    run(flags(tiny_model, *four, output="whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_unfinished_work_without_resume_is_refused(interrupted: Path, tiny_model: Path, flags: Flags) -> None:
    with pytest.raises(ResQError, match=r"holds an unfinished run; add --resume"):
        run(flags(tiny_model))


def test_resume_with_other_flags_names_them(interrupted: Path, tiny_model: Path, flags: Flags) -> None:
    with pytest.raises(
        ResQError, match=r"belongs to a run with another high_fraction, model or calibration text, seed"
    ):
        run(flags(tiny_model, "--resume", "--seed", "9", "--high-fraction", "0.25"))


def test_truncated_step_is_named(interrupted: Path, tiny_model: Path, flags: Flags) -> None:
    step = interrupted / "out.resq-work" / "layer-00000.safetensors"
    step.write_bytes(step.read_bytes()[:100])
    with pytest.raises(ResQError, match=r"layer-00000\.safetensors cannot be read"):
        run(flags(tiny_model, "--resume"))
