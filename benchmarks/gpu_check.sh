#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on a machine with an NVIDIA GPU, in less than 8 minutes, without network.
#
#     benchmarks/gpu_check.sh [WHEELHOUSE]
#
# WHEELHOUSE: a folder of wheels for what is missing (pytest, hypothesis, typer, rich, nvidia-cuda-nvcc, …). The Python is
# that of $PYTHON (python3). Results go to $OUT, or to results/gpu-<time> where that is not set: a log and a status of
# every step, steps.json, gpu_linear.json. A step that fails or runs out of time does not stop the next ones; the exit
# status is 1 when any failed. On a machine without nvcc, what was built elsewhere (resq_vllm/_C*.abi3.so) is used.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheelhouse=${1:-}
out=${OUT:-results/gpu-$(date +%Y-%m-%dT%H-%M)}
deadline=$((SECONDS + 465))
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: runs it with at most so many seconds, within the script's own limit.
step() {
  local name=$1 limit=$2 started=$SECONDS left=$((deadline - SECONDS)) status
  shift 2
  if ((left < 5)); then
    echo "$name: no time left"
    printf '%s\t%s\t%s\n' "$name" 0 "no time left" >>"$out/steps.tsv"
    failed=1
    return
  fi
  ((limit > left)) && limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  ((status)) && failed=1
  printf '%s\t%s\t%s\n' "$name" "$((SECONDS - started))" "$status" >>"$out/steps.tsv"
  echo "$name: status $status after $((SECONDS - started)) s ($(tail -n 1 "$out/$name.log" | cut -c 1-120))"
}

if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu_check.sh needs an NVIDIA GPU, and nvidia-smi lists none here." >&2
  exit 2
fi
mkdir -p "$out"
rm -f "$out/steps.tsv"
nvidia-smi -L >"$out/gpu.txt"
nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.max.sm,memory.total --format=csv,noheader >>"$out/gpu.txt"
git log -1 --format=%H >"$out/commit.txt" 2>/dev/null

if [ -n "$wheelhouse" ]; then
  site="$out/site"
  step install 90 "$python" -m pip install -q --no-index --find-links "$wheelhouse" --target "$site" \
    pytest hypothesis typer rich pydantic
  export PYTHONPATH="$PYTHONPATH:$site"
fi
# Only this chip's code: the build is then a fraction of the full one.
chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
case $chip in 90) chip=90a ;; esac
if "$python" -c 'import sys; from tools import cuda_build; sys.exit(cuda_build.find_nvcc() is None)'; then
  RESQ_CUDA_ARCHS=${RESQ_CUDA_ARCHS:-sm_$chip} step build 150 "$python" setup.py -q build_ext --inplace
else
  echo "build: nvcc is not here; resq_vllm/_C*.abi3.so are used as they are"
fi
step load 60 "$python" -c 'import torch; from resq_vllm import cuda, ops; cuda.require(0); print(ops.isa(), torch.__version__)'
step tests 150 "$python" -m pytest -p no:cacheprovider tests/csrc/cuda/test_gpu_*.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    # One process of small shapes; the sanitizer slows kernels down ten- to a hundredfold.
    step "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.gpu_small
  done
else
  echo "memcheck, racecheck: compute-sanitizer is not here"
  printf 'memcheck\t0\tnot here\nracecheck\t0\tnot here\n' >>"$out/steps.tsv"
fi
step quantize 45 "$python" -m benchmarks.gpu_quantize --json "$out/gpu_quantize.json"
step linear 240 "$python" -m benchmarks.gpu_linear --json "$out/gpu_linear.json"

"$python" - "$out" <<'PYTHON'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
rows = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
steps = [{"step": name, "seconds": int(seconds), "status": status} for name, seconds, status in rows]
(out / "steps.json").write_text(json.dumps({"gpu": (out / "gpu.txt").read_text().splitlines(), "steps": steps}, indent=2) + "\n")
PYTHON
exit $failed
