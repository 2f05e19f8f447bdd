"""benchmarks/gpu_serve.sh without a GPU: its refusals, what it sets up, and what it hands on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_serve

SCRIPT = Path(gpu_serve.__file__).with_suffix(".sh")


def script(*arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_script_names_its_stages() -> None:
    done = script("everything")
    assert done.returncode == 2
    assert "the stage must be correctness, 8b, 1b or serve, not 'everything'" in done.stderr
    assert script().returncode == 2


def test_script_wants_the_bundle_that_it_is_given(tmp_path: Path) -> None:
    done = script("8b", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert f"there is no folder {tmp_path / 'absent'} to take vLLM from" in done.stderr


def test_script_wants_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = script("correctness", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr


def test_script_wants_the_folder_of_an_earlier_call(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "EARLIER": str(tmp_path / "absent")}
    done = subprocess.run(["bash", str(SCRIPT), "8b"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert f"there is no folder {tmp_path / 'absent'} with an earlier call's files" in done.stderr


Tree = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Runs a copy of the script in a tree without .git, with stand-ins for nvidia-smi, the bundle and Python.

    Returns exit status and what was called, in order; Python ends its stage with status 75.
    """
    calls = tmp_path / "calls"
    tools = {
        "nvidia-smi": 'case "$1" in -L) echo "GPU 0" ;; *) echo "H200, 580, 9.0, 1" ;; esac',
        # No nvcc here: the check for it fails.
        "python": f'echo "$*" >>{calls}; case "$*" in *cuda_build*) exit 1 ;; *benchmarks.gpu_serve*) exit 75 ;; esac',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "install_bundle.sh").write_text(f'mkdir -p "$2"; echo "install $*" >>{calls}; echo >"$2/env.sh"\n')
    copy = tmp_path / "tree" / "benchmarks" / SCRIPT.name
    copy.parent.mkdir(parents=True)
    for name in (SCRIPT.name, "gpu_setup.sh"):
        shutil.copy(SCRIPT.with_name(name), copy.with_name(name))

    def run(says: str = "", **variables: str) -> tuple[int, list[str]]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
        environment |= {"SITE": str(tmp_path / "site"), "WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
        command = ["bash", str(copy), "8b", str(bundle), "--contender", "resq"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment | variables)
        assert done.stderr.strip() == says
        return done.returncode, calls.read_text().splitlines()

    return run


def test_script_sets_up_and_runs_its_stage(tree: Tree, tmp_path: Path) -> None:
    for _ in range(2):
        # The stage's own status: call again.
        status, lines = tree()
        assert status == 75
    assert lines[0] == f"install --to {tmp_path / 'site'} {tmp_path / 'bundle'}/out/core"
    # The second call finds the bundle unpacked.
    assert sum(line.startswith("install") for line in lines) == 1
    assert lines[-1].startswith(f"-m benchmarks.gpu_serve 8b --out {tmp_path / 'out'} --work {tmp_path / 'work'}")
    assert lines[-1].endswith("--contender resq")
    assert (tmp_path / "out" / "gpu.txt").read_text().startswith("H200")


def test_a_bundle_that_cannot_be_unpacked_ends_it(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "bundle" / "install_bundle.sh").write_text(f"echo unpack >>{tmp_path / 'calls'}; exit 3\n")
    status, lines = tree("gpu_serve.sh: unpacking vLLM failed, or took longer than 90 s.")
    assert (status, lines) == (1, ["unpack"])


def test_commit_comes_from_the_environment_or_a_file_where_there_is_no_git(tree: Tree, tmp_path: Path) -> None:
    written = tmp_path / "out" / "commit.txt"
    tree()
    assert written.read_text() == "unknown: no .git, no $RESQ_COMMIT, no commit.txt\n"
    (tmp_path / "tree" / "commit.txt").write_text("abc\n")
    tree()
    assert written.read_text() == "abc\n"
    tree(RESQ_COMMIT="def")
    assert written.read_text() == "def\n"


def test_commit_of_a_repository_shows_changes(tree: Tree, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *name, *words], cwd=tmp_path / "tree", capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "tag")
    tree()
    assert (tmp_path / "out" / "commit.txt").read_text() == git("rev-parse", "HEAD") + "\n"
    (tmp_path / "tree" / "benchmarks" / SCRIPT.name).chmod(0o700)
    with (tmp_path / "tree" / "benchmarks" / SCRIPT.name).open("a") as script_file:
        script_file.write("\n")
    tree()
    assert (tmp_path / "out" / "commit.txt").read_text() == git("rev-parse", "HEAD") + "-dirty\n"


def test_files_of_an_earlier_call_are_taken_over_for_their_stage(tree: Tree, tmp_path: Path) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    for name in ("gpu_serve_8b.json", "gpu_serve_8b.answers.json", "gpu_serve_1b.answers.json", "gpu.txt"):
        (earlier / name).write_text("earlier")
        (earlier / name).chmod(0o444)
    out.mkdir()
    (out / "gpu_serve_8b.json").write_text("newer")
    tree(EARLIER=str(earlier))
    assert (out / "gpu_serve_8b.answers.json").read_text() == "earlier"
    assert (out / "gpu_serve_8b.json").read_text() == "newer"
    assert not (out / "gpu_serve_1b.answers.json").exists()
