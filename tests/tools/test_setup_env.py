"""`make setup`'s decisions: is an environment usable where it stands, is there a GPU."""

from __future__ import annotations

import shutil
import venv
from pathlib import Path

import pytest

from tools import cuda_build, setup_env


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment with pip's script, made without downloading pip."""
    folder = tmp_path / ".venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (folder / "bin" / "pip").write_text(f"#!{folder}/bin/python\nimport pip\n")
    return folder


def test_environment_is_kept_where_it_was_made(environment: Path) -> None:
    assert setup_env.usable(environment)


def test_copied_environment_is_made_again(environment: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / ".venv"
    shutil.copytree(environment, copy, symlinks=True)
    assert not setup_env.usable(copy)


def test_environment_without_interpreter_is_made_again(environment: Path) -> None:
    (environment / "bin" / "python").unlink()
    assert not setup_env.usable(environment)


def test_other_python_version_is_made_again(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "PYTHON_VERSION", (3, 99))
    assert not setup_env.usable(environment)


def test_other_python_version_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "PYTHON_VERSION", (3, 99))
    assert setup_env.main() == 2
    assert "make setup PYTHON=python3.99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: NVIDIA H200'", True), ("echo 'No devices were found'; exit 6", False), ("exit 9", False)],
    ids=["gpu", "no-device", "driver-fails"],
)
def test_cuda_means_that_nvidia_smi_lists_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: bool
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert setup_env.has_cuda() == expected


def test_nvcc_is_installed_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def install(*arguments: str, check: bool = True) -> bool:
        calls.append(arguments)
        return True

    monkeypatch.setattr(setup_env, "install", install)
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: Path("/usr/local/cuda/bin/nvcc"))
    setup_env.install_cuda_compiler()
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    monkeypatch.setenv("RESQ_CUDA", "0")
    setup_env.install_cuda_compiler()
    assert calls == []
    monkeypatch.delenv("RESQ_CUDA")
    setup_env.install_cuda_compiler()
    (found,) = calls
    assert [name.partition("==")[0] for name in found[-2:]] == ["nvidia-cuda-nvcc", "nvidia-cuda-cccl"]
    # The limits of csrc/cuda/limits.json are those of one ptxas: it is pinned.
    assert set(found[-2:]) <= set(setup_env.CONSTRAINTS.read_text().splitlines())


def test_no_nvidia_smi_means_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not setup_env.has_cuda()
