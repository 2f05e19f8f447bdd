"""The stamp of `make setup`: what makes an environment or the extension out of date, and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.fingerprint import ENVIRONMENT_FILES, STAMP_NAME, Stamp, current_stamp, digest, read_stamp, write_stamp

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the stamp looks at, with one C++ source."""
    for name in (*ENVIRONMENT_FILES, "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "setup.py").write_text("setup()\n")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "linear.cpp").write_text("int f();\n")
    return tmp_path


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_same_sources_same_stamp(checkout: Path) -> None:
    assert current_stamp(checkout, "cpu") == current_stamp(checkout, "cpu")


def test_cpu_and_cuda_environments_differ(checkout: Path) -> None:
    assert current_stamp(checkout, "cpu").environment != current_stamp(checkout, "cuda").environment


def test_changed_cpp_source_only_recompiles(checkout: Path) -> None:
    before = current_stamp(checkout, "cpu")
    append(checkout / "csrc" / "cpu" / "linear.cpp", "int g();\n")
    after = current_stamp(checkout, "cpu")
    assert after.environment == before.environment
    assert after.extension != before.extension


def test_renamed_cpp_source_recompiles(checkout: Path) -> None:
    before = current_stamp(checkout, "cpu")
    (checkout / "csrc" / "cpu" / "linear.cpp").rename(checkout / "csrc" / "cpu" / "gemm.cpp")
    assert current_stamp(checkout, "cpu").extension != before.extension


@pytest.mark.parametrize(
    ("change", "renewed"),
    [
        (lambda root: append(root / "tools" / "constraints-cpu.txt", "other==1\n"), True),
        (lambda root: append(root / "pyproject.toml", '\n[tool.setuptools.exclude-package-data]\n"*" = ["x"]\n'), True),
        (lambda root: append(root / "pyproject.toml", "\n[tool.some_linter]\nstrict = true\n"), False),
        (lambda root: append(root / "pyproject.toml", "\n# a comment\n"), False),
    ],
    ids=["constraint", "packaging", "lint-settings", "comment"],
)
def test_environment_follows_what_decides_the_packages(
    checkout: Path, change: Callable[[Path], None], renewed: bool
) -> None:
    before = current_stamp(checkout, "cpu").environment
    change(checkout)
    assert (current_stamp(checkout, "cpu").environment != before) == renewed


def test_digest_does_not_depend_on_order_but_on_boundaries() -> None:
    assert digest([("a", b"1"), ("b", b"2")]) == digest([("b", b"2"), ("a", b"1")])
    assert digest([("a", b"1"), ("b", b"2")]) != digest([("a", b"1b"), ("", b"2")])


def test_stamp_round_trip(tmp_path: Path) -> None:
    stamp = Stamp(environment="e", extension="x", place=str(tmp_path))
    write_stamp(tmp_path, stamp)
    assert read_stamp(tmp_path) == stamp


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"environment": "e"})])
def test_unreadable_stamp_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / STAMP_NAME).write_text(text)
    assert read_stamp(tmp_path) is None


def test_absent_environment_has_no_stamp(tmp_path: Path) -> None:
    assert read_stamp(tmp_path / ".venv") is None
