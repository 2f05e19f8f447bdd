"""The metadata-only distribution `vllm`: found by importlib.metadata, removable by pip, never over a real vLLM."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tools.vllm_cpu_shim import ShimError, shim_version, write_shim


def found_version(site: Path) -> str:
    (distribution,) = importlib.metadata.distributions(name="vllm", path=[str(site)])
    return distribution.version


@pytest.mark.parametrize("wheel", ["0.32.0", "0.32.0+cpu"])
def test_version_names_the_cpu(wheel: str) -> None:
    assert shim_version(wheel) == "0.32.0+cpu"


def test_importlib_metadata_finds_it(tmp_path: Path) -> None:
    write_shim(tmp_path, "0.32.0")
    assert found_version(tmp_path) == "0.32.0+cpu"


def test_record_lists_every_file_with_its_size(tmp_path: Path) -> None:
    folder = write_shim(tmp_path, "0.32.0")
    (distribution,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    files = distribution.files or []
    assert {Path(str(file)).name for file in files} == {path.name for path in folder.iterdir()}
    assert all(file.size == (tmp_path / str(file)).stat().st_size for file in files if file.name != "RECORD")


def test_writing_again_replaces_an_older_version(tmp_path: Path) -> None:
    write_shim(tmp_path, "0.31.0")
    write_shim(tmp_path, "0.32.0")
    assert found_version(tmp_path) == "0.32.0+cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]


def test_real_vllm_is_left_alone(tmp_path: Path) -> None:
    real = tmp_path / "vllm-0.32.0.dist-info"
    real.mkdir()
    (real / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    (real / "INSTALLER").write_text("pip\n")
    with pytest.raises(ShimError, match=r"already holds the distribution vllm 0\.32\.0"):
        write_shim(tmp_path, "0.32.0")
    assert found_version(tmp_path) == "0.32.0"


def test_pip_uninstalls_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    write_shim(site, "0.32.0")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "--yes", "vllm"], check=True, capture_output=True)
    assert list(site.glob("vllm*")) == []
