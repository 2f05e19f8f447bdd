"""benchmarks/gpu_check.sh with stand-ins for nvidia-smi, compute-sanitizer and Python: what runs, and what is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_linear, gpu_small
from resq_vllm.quantized_linear import KERNELS

SCRIPT = Path(gpu_linear.__file__).with_name("gpu_check.sh")
BEFORE = ["build", "load", "check", "tests", "triton", "compiled", "linear_8b", "attention_8b"]
SANITIZED = ["memcheck", "memcheck_kv", "racecheck", "racecheck_wgmma"]
ORDER = [*BEFORE, *SANITIZED, "linear_70b", "quantize", "attention_1b"]
# Real only for the report. FAIL names a step by a word of its command.
PYTHON = f"""
case "$1" in *gpu_check_report.py) exec {sys.executable} "$@" ;; esac
echo "$PYTHONPATH| $RESQ_CUDA_ARCHS $RESQ_TEST_DEVICE${{TRITON_INTERPRET:-}} $*" >>$CALLS
case "$*" in
  *importlib*) for name in $(cat $STATE/missing 2>/dev/null); do
    [ -e $STATE/installed_$name ] || case " $* " in *" $name "*) printf '%s ' "$name" ;; esac
  done ;;
  *"pip install"*) for name; do touch $STATE/installed_$(basename "$name" | tr - _); done ;;
  *--check-only*) ${{CHECK:-true}}; echo "GPU: 0 of 812 cases differ from the reference" ;;
  *checks_*) echo "${{TESTS:-7 passed, 1 warning in 2.50s}}" ;;
  *--json*) for last; do :; done; echo '{{}}' >"$last" ;;
esac
if [ -n "${{FAIL:-}}" ]; then case "$*" in *"$FAIL"*) echo "no such thing"; exit 3 ;; esac; fi
true
"""
SANITIZER = """
echo "sanitizer $PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>$CALLS
case "$*" in *--kernels*wgmma*) ${WGMMA:-true} ;; *checks_*) echo "4 passed, 30 deselected in 9.00s" ;; esac
echo "========= ${SUMMARY:-ERROR SUMMARY: 0 errors}"
"""


class Machine:
    """A folder of stand-ins and of what the script leaves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.calls_file = folder, folder / "out", folder / "calls"
        self.script = SCRIPT
        self.tool(
            "nvidia-smi", 'case "$*" in -L) echo "GPU 0" ;; *=compute_cap*) echo 9.0 ;; *) echo "H200, 580" ;; esac'
        )
        self.tool("compute-sanitizer", SANITIZER)
        self.tool("python", PYTHON)

    def tool(self, name: str, body: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.folder / name).chmod(0o755)

    def copy_script(self, changes: dict[str, str]) -> None:
        """A copy in a tree of its own, with text replaced."""
        self.script = self.folder / "tree" / "benchmarks" / SCRIPT.name
        self.script.parent.mkdir(parents=True)
        for name in ("gpu_setup.sh", "gpu_check_report.py"):
            (self.script.parent / name).write_text(SCRIPT.with_name(name).read_text())
        text = SCRIPT.read_text()
        for found, replacement in changes.items():
            assert found in text
            text = text.replace(found, replacement)
        self.script.write_text(text)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        here = {"PYTHON": str(self.folder / "python"), "CALLS": str(self.calls_file), "STATE": str(self.folder)}
        # Outside this environment: its Python is not for the script.
        here |= {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "TMPDIR": str(self.folder),
            "HOME": os.environ.get("HOME", "/"),
        }
        environment = here | {"OUT": str(self.out)}
        command = ["bash", str(self.script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment | variables)

    @property
    def calls(self) -> str:
        return self.calls_file.read_text()

    def call(self, word: str) -> str:
        return next(line for line in self.calls.splitlines() if word in line)

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "steps.json").read_text())
        return found

    @property
    def results(self) -> dict[str, str]:
        return {row["step"]: row["result"] for row in self.report["steps"]}

    def row(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.report["steps"] if row["step"] == name)
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_limits_of_the_steps_leave_room_in_8_minutes() -> None:
    text = SCRIPT.read_text()
    order = re.search(r"^order=\((.*?)\)$", text, re.MULTILINE | re.DOTALL)
    deadline = re.search(r"^deadline=\$\(\(SECONDS \+ (\d+)\)\)$", text, re.MULTILINE)
    assert order is not None
    assert deadline is not None
    words = order[1].split()
    assert words[::2] == ["unpack", "install", *ORDER]
    # A step that does not end when told to is killed 5 s later.
    assert sum(map(int, words[1::2])) <= int(deadline[1]) < 480 - 5


def test_everything_runs_in_order_and_few_files_are_left(machine: Machine) -> None:
    done = machine.run(RESQ_COMMIT="abc", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert machine.results == dict.fromkeys(ORDER, "ok")
    assert list(machine.results) == ORDER
    figures = [f"gpu_{name}.json" for name in ("linear_8b", "linear_70b", "quantize", "attention_8b", "attention_1b")]
    assert {path.name for path in machine.out.iterdir()} == {*figures, "steps.json", "logs.tar.gz"}
    with tarfile.open(machine.out / "logs.tar.gz") as archive:
        assert {f"logs/{name}.log" for name in ORDER} <= set(archive.getnames())
    assert {key: machine.report[key] for key in ("gpu", "commit", "exit_status")} == {
        "gpu": "H200, 580",
        "commit": "abc",
        "exit_status": 0,
    }


def test_checks_run_compiled_on_the_card(machine: Machine) -> None:
    machine.run(TRITON_INTERPRET="1")
    tests = machine.call("test_gpu_quantize.py")
    # TRITON_INTERPRET would stand behind the device.
    assert " cuda -m pytest" in tests
    assert "-n 8" in tests
    found = [SCRIPT.parents[1] / name for name in re.findall(r"\S+/(?:checks|test)_\w+\.py", tests)]
    assert all(path.is_file() for path in found), found
    checks = set((SCRIPT.parents[1] / "tests" / "resq_vllm" / "gpu_kv").glob("checks_*.py"))
    assert checks - set(found) == {
        path for path in checks if path.name in ("checks_compiled.py", "checks_cuda_decode.py")
    }


def test_counts_are_those_of_the_logs(machine: Machine) -> None:
    machine.run(TESTS="2 failed, 20 passed, 1 skipped, 3 warnings, 1 error in 4.20s", FAIL="test_gpu_quantize")
    keys = ("rc", "passed", "failed", "skipped")
    assert [machine.row("tests")[key] for key in keys] == [3, 20, 3, 1]
    assert [machine.row("check")[key] for key in keys] == [0, 812, 0, 0]
    assert [machine.row("memcheck_kv")[key] for key in keys] == [0, 4, 0, 0]
    assert [machine.row("linear_8b")[key] for key in keys] == [0, None, None, None]


@pytest.mark.parametrize("said", ["150 skipped in 1.00s", "30 passed, 150 skipped in 1.00s", "no tests ran in 0.10s"])
def test_tests_that_are_skipped_on_a_gpu_have_not_passed(machine: Machine, said: str) -> None:
    done = machine.run(TESTS=said)
    assert done.returncode == 1
    assert "did not say" in machine.results["tests"]


def test_sanitizers_see_small_shapes_and_every_allocation(machine: Machine) -> None:
    machine.run()
    lines = [line for line in machine.calls.splitlines() if line.startswith("sanitizer")]
    assert all(line.startswith("sanitizer 1 --target-processes application-only --error-exitcode 9") for line in lines)
    assert [re.findall(r"--tool (\w+)", line) for line in lines] == [["memcheck"]] * 2 + [["racecheck"]] * 2
    assert [line.partition("--kernels ")[2] for line in lines] == ["", "", "others", "wgmma"]
    code = "".join((SCRIPT.parents[1] / name).read_text() for name in re.findall(r"\S+/checks_\w+\.py", lines[1]))
    chosen = lines[1].partition(" -k ")[2].split(" or ")
    assert len(chosen) == 4
    assert all(word in code for word in chosen)


def test_a_cpu_library_that_loads_is_not_built(machine: Machine) -> None:
    machine.run()
    assert "setup.py" not in machine.calls
    assert "| sm_90a  -m tools.cuda_build" in machine.call("-m tools.cuda_build")
    machine.run(FAIL="ops.isa()")
    assert "setup.py -q build_ext --inplace" in machine.calls


@pytest.mark.parametrize(("word", "step"), [("-m tools.cuda_build", "build"), ("cuda.require(0)", "load")])
def test_without_a_library_that_loads_nothing_more_is_run(machine: Machine, word: str, step: str) -> None:
    done = machine.run(FAIL=word)
    assert done.returncode == 1
    assert list(machine.results) == ORDER[: ORDER.index(step) + 1]
    assert machine.results[step] == "exit status 3"
    assert machine.report["exit_status"] == 1
    assert "no such thing" in done.stdout
    assert {path.name for path in machine.out.iterdir()} == {"steps.json", "logs.tar.gz"}


def test_a_step_that_fails_is_told_and_the_next_run(machine: Machine) -> None:
    for word, step in (("--check-only", "check"), ("attention_1b", "attention_1b")):
        done = machine.run(FAIL=word)
        assert done.returncode == 1
        assert machine.results == dict.fromkeys(ORDER, "ok") | {step: "exit status 3"}


def test_a_check_that_compared_nothing_is_not_ok(machine: Machine) -> None:
    machine.tool("python", PYTHON.replace("0 of 812", "0 of 0"))
    assert machine.run().returncode == 1
    assert "did not say" in machine.results["check"]


def test_a_sanitizer_is_clean_only_where_it_says_so(machine: Machine) -> None:
    done = machine.run(SUMMARY="Device not supported")
    assert done.returncode == 1
    assert all("did not say" in machine.results[name] for name in SANITIZED)


def test_a_sanitizer_that_is_absent_has_not_passed(machine: Machine) -> None:
    (machine.folder / "compute-sanitizer").unlink()
    machine.copy_script({"/usr/local/cuda*": str(machine.folder / "absent*")})
    done = machine.run()
    assert done.returncode == 1
    assert "compute-sanitizer is not here: not checked" in done.stdout
    for name in SANITIZED:
        assert machine.row(name)["result"] == "compute-sanitizer is not here: not checked"
        assert machine.row(name)["rc"] is None


def test_a_step_that_runs_out_of_time_is_not_ok(machine: Machine) -> None:
    # 10 s for this step and the two before it: of the 70, the next is promised 60, which all behind it share.
    least = " ".join(f"{name} {60 if name == 'tests' else 0}" for name in ["unpack", "install", *ORDER])
    order = re.search(r"^order=\(.*?\)$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert order is not None
    machine.copy_script({"SECONDS + 468": "SECONDS + 70", order[0]: f"order=({least})"})
    done = machine.run(CHECK="sleep 200")
    assert done.returncode == 1
    assert machine.results["load"] == "ok"
    assert re.fullmatch(r"timed out after \d+ s", machine.results["check"])
    assert machine.row("check")["rc"] == 124
    assert machine.results["linear_70b"] == "ok"


def test_steps_for_which_no_time_is_left_are_told(machine: Machine) -> None:
    machine.copy_script({"attention_1b 10)": "attention_1b 500)"})
    done = machine.run()
    assert done.returncode == 1
    assert machine.results == {"build": "no time left"}


def test_a_run_that_is_cut_off_leaves_the_steps_before(machine: Machine) -> None:
    # The shell of the stand-in, timeout, the script.
    machine.tool("compute-sanitizer", "kill -KILL $(cut -d ' ' -f 4 /proc/$PPID/stat)")
    assert machine.run().returncode == -9
    assert list(machine.results) == BEFORE
    assert machine.report["exit_status"] is None
    assert (machine.out / "logs.tar.gz").exists()


def test_what_nothing_runs_without_is_named_before_anything_is_built(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "missing").write_text("pydantic\n")
    done = machine.run()
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.endswith("lacks pydantic: give a folder of wheels, or vLLM's bundle, that has them.")
    assert not machine.results
    assert machine.report["exit_status"] == 2


def test_without_hypothesis_the_tests_that_can_run_do_and_the_rest_is_told(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "missing").write_text("hypothesis xdist\n")
    done = machine.run()
    assert done.returncode == 1
    assert machine.results == {"packages": "lacks hypothesis: tests that need it are not run"} | dict.fromkeys(
        ORDER, "ok"
    )
    tests = machine.call("test_gpu_quantize.py")
    assert "--continue-on-collection-errors --noconftest tests/" in tests


def test_only_what_is_missing_is_installed_and_not_into_the_results(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "missing").write_text("pydantic pydantic_core click\n")
    (tmp_path / "wheels").mkdir()
    for name in (
        "pydantic-2.14.3-py3-none-any",
        "pydantic_core-2.50.4-cp312-cp312-manylinux_2_17",
        "rich-1-py3-none-any",
    ):
        (tmp_path / "wheels" / f"{name}.whl").touch()
    done = machine.run(str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stdout + done.stderr
    install = machine.call("pip install")
    assert "--no-index --no-deps" in install
    target, *names = install.partition("--target ")[2].split()
    assert names == ["pydantic", "pydantic-core"]
    assert not target.startswith(str(machine.out))
    assert not Path(target).parent.exists()
    assert machine.call("gpu_linear").partition("|")[0].endswith(f":{target}")


def test_vllm_comes_from_the_bundle_into_a_folder_that_is_kept_where_it_is_named(
    machine: Machine, tmp_path: Path
) -> None:
    bundle, site = tmp_path / "bundle", tmp_path / "site"
    bundle.mkdir()
    (bundle / "install_bundle.sh").write_text(
        f'echo "unpack $*" >>{machine.calls_file}; echo "export PYTHONPATH=$2" >"$2/env.sh"\n'
    )
    for _ in range(2):
        assert machine.run("", str(bundle), SITE=str(site)).returncode == 0
    assert machine.calls.count("unpack --to") == 1
    assert f"unpack --to {site} {bundle}/out/core" in machine.calls
    assert machine.call("gpu_linear").partition("|")[0].endswith(f":{site}")
    done = machine.run("", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert f"there is no folder {tmp_path / 'absent'} to take vLLM from" in done.stderr


def test_without_a_gpu_one_sentence_and_code_2(machine: Machine) -> None:
    machine.tool("nvidia-smi", "exit 9")
    done = machine.run()
    assert done.returncode == 2
    assert done.stderr == "gpu_check.sh: an NVIDIA GPU is needed, and nvidia-smi lists none here.\n"
    assert not machine.out.exists()


@pytest.mark.parametrize("tokens", [1, 40])
def test_both_families_together_are_all_kernels(tokens: int) -> None:
    for plan in gpu_small.PLANS.values():
        families = [{k for k, _ in gpu_small.chosen(f, 9, plan, tokens)} for f in ("wgmma", "others", "all")]
        assert families[0] | families[1] == families[2]
        assert families[0] == {kernel for kernel in KERNELS if kernel.startswith("wgmma")}
        assert not families[0] & families[1]
        assert not gpu_small.chosen("wgmma", 8, plan, tokens)
