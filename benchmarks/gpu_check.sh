#!/usr/bin/env bash
# Builds, checks and measures the CUDA and Triton kernels on a machine with an NVIDIA GPU, in less than 8 minutes and
# without network:
#
#     benchmarks/gpu_check.sh [WHEELHOUSE [BUNDLE]]
#
# WHEELHOUSE: a folder of wheels for what $PYTHON (python3) lacks of the packages below, such as pydantic; "" for none.
# BUNDLE (or $RESQ_BUNDLE): where vLLM comes from, whose kernels are measured beside ours, unless $PYTHON has it: see
# gpu_setup.sh; it is unpacked into $SITE, or into a temporary folder. $RESQ_COMMIT: whose code this is, without .git.
#
# Into $OUT, or results/gpu-<time> where that is not set, go only steps.json (how every step ended and what it counted),
# the figures (gpu_*.json) and logs.tar.gz. A step that fails, cannot run or runs out of time does not stop the next
# ones, except the build and the loading of the library. Exit status: 0 when all steps are ok, 1 when one is not, 2 when
# nothing can begin.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheelhouse=${1:-}
bundle=${2-${RESQ_BUNDLE:-}}
out=${OUT:-results/gpu-$(date +%Y-%m-%dT%H-%M)}
# What nothing runs without, what only tests import, and all that these import in turn.
required="numpy pydantic typer rich"
for_tests="pytest hypothesis"
everything="$required $for_tests typing_extensions pydantic_core annotated_types typing_inspection click shellingham
  annotated_doc pygments iniconfig packaging pluggy sortedcontainers"
# Seconds that every step gets at least, in order of value; it gets more as long as none behind it needs them.
order=(unpack 60 install 15 build 60 load 20 check 25 tests 40 triton 20 compiled 18 linear_8b 50 attention_8b 40
  memcheck 25 memcheck_kv 20 racecheck 20 racecheck_wgmma 20 linear_70b 15 quantize 10 attention_1b 10)
deadline=$((SECONDS + 468))
failed=0

refuse() {
  echo "gpu_check.sh: $1" >&2
  exit 2
}

report() { "$python" benchmarks/gpu_check_report.py "$scratch" "$out" "$@"; }

# record NAME SECONDS STATUS RESULT: "ok" or what was wrong.
record() {
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$scratch/steps.tsv"
  echo "$1: $4, $2 s"
  [ "$4" = ok ] || failed=1
  report
}

# Seconds that a step may take now: all that is left but the least of the steps behind it.
allowed() {
  local index behind=0 found=0
  for ((index = 0; index < ${#order[@]}; index += 2)); do
    ((found)) && behind=$((behind + order[index + 1]))
    [ "${order[index]}" = "$1" ] && found=1
  done
  echo $((deadline - SECONDS - behind))
}

# [expect=REGEX] step NAME COMMAND...: its status is 0 when it is ok, which with expect means also that the log has it.
step() {
  local name=$1 started=$SECONDS limit status said=ok log=$scratch/logs/$1.log
  limit=$(allowed "$name")
  shift
  if ((limit < 3)); then
    record "$name" 0 - "no time left"
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1
  status=$?
  if ((status == 124 || (status == 137 && SECONDS - started >= limit))); then
    said="timed out after $limit s"
  elif ((status)); then
    said="exit status $status"
  elif [ -n "${expect:-}" ] && ! grep -qE "$expect" "$log"; then
    said="ended well, but did not say \"$expect\""
  fi
  record "$name" $((SECONDS - started)) $status "$said"
  tail -n "$([ "$said" = ok ] && echo 1 || echo 15)" "$log" | cut -c 1-400
  [ "$said" = ok ]
}

# Of the packages, those that cannot be imported.
lacking() {
  "$python" -c '
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(name, end=" ")' "$@"
}

# Those of the packages that have a wheel: pip installs nothing when one of them has none.
wheels_of() {
  local name
  for name in "$@"; do
    compgen -G "$wheelhouse/$name-*.whl" >/dev/null && echo "${name//_/-}"
  done
}

finish() {
  local status=$?
  rm -f "$out"/*.new
  report "$status"
  rm -rf "$scratch"
}

nvidia-smi -L >/dev/null 2>&1 || refuse "an NVIDIA GPU is needed, and nvidia-smi lists none here."
[ -z "$wheelhouse" ] || [ -d "$wheelhouse" ] || refuse "there is no folder $wheelhouse of wheels."
[ -z "$bundle" ] || [ -d "$bundle" ] || refuse "there is no folder $bundle to take vLLM from."
"$python" -c '' || refuse "$python does not run."
mkdir -p "$out" || exit 2
scratch=$(mktemp -d) || exit 2
mkdir "$scratch/logs"
: >"$scratch/steps.tsv"
fields=name,driver_version,compute_cap,clocks.max.sm,memory.total
nvidia-smi --query-gpu=$fields --format=csv,noheader >"$scratch/gpu.txt"
RESQ_COMMIT=$(bash benchmarks/gpu_setup.sh commit)
site=${SITE:-$scratch/site}
export RESQ_COMMIT PYTHON=$python PYTHONUNBUFFERED=1
trap finish EXIT
trap 'exit 143' TERM INT

if [ -n "$bundle" ]; then
  step unpack bash benchmarks/gpu_setup.sh unpack "$bundle" "$site"
  # shellcheck disable=SC1091
  [ -f "$site/env.sh" ] && . "$site/env.sh"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck disable=SC2046,SC2086
if [ -n "$wheelhouse" ] && [ -n "$(lacking $required $for_tests)" ]; then
  step install "$python" -m pip install -q --no-index --no-deps --no-compile --find-links "$wheelhouse" \
    --target "$scratch/packages" $(wheels_of $(lacking $everything))
  export PYTHONPATH="$PYTHONPATH:$scratch/packages"
fi
# shellcheck disable=SC2086
missing=$(lacking $required) || refuse "$python does not run."
[ -z "$missing" ] || refuse "$python lacks ${missing% }: give a folder of wheels, or vLLM's bundle, that has them."
# shellcheck disable=SC2086
missing=$(lacking $for_tests)
[ -z "$missing" ] || record packages 0 - "lacks ${missing% }: tests that need it are not run"

step build bash benchmarks/gpu_setup.sh build || exit 1
step load "$python" -c 'import torch, triton; from resq_vllm import cuda, ops; cuda.require(0)
print(ops.isa(), "torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' || exit 1

# The linear layers' GPU test is the same check.
expect='\b0 of [1-9][0-9]* cases differ' step check "$python" -m benchmarks.gpu_linear --check-only
# Triton compiles for the card here, unless it is told to interpret. A test that is skipped on a GPU has not passed.
unset TRITON_INTERPRET
export RESQ_TEST_DEVICE=cuda
pytest=("$python" -m pytest -p no:cacheprovider --continue-on-collection-errors)
passed='^=* *[1-9][0-9]* passed(, [0-9]+ (deselected|warnings?))* in '
# tests/conftest.py needs hypothesis, too.
case $missing in *hypothesis*) pytest+=(--noconftest) ;; esac
parallel=()
[ -n "$(lacking xdist)" ] || parallel=(-n 8)
kv=tests/resq_vllm/gpu_kv
# checks_compiled.py compiles for a chip that it does not use: in a process of its own. checks_cuda_decode.py emulates what
# checks_attention.py runs here.
tests=(tests/csrc/cuda/test_gpu_quantize.py tests/benchmarks/checks_gpu_attention.py)
for file in $kv/checks_*.py; do
  case $file in */checks_compiled.py | */checks_cuda_decode.py) ;; *) tests+=("$file") ;; esac
done
expect=$passed step tests "${pytest[@]}" "${parallel[@]}" "${tests[@]}"
# Decodes by Triton's kernel, whose place the CUDA kernel takes above.
expect=$passed step triton env RESQ_CUDA_ATTENTION=0 "${pytest[@]}" "${parallel[@]}" $kv/checks_attention.py \
  $kv/checks_graph.py
chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
expect=$passed step compiled env RESQ_TEST_CHIP="${chip/./}" "${pytest[@]}" $kv/checks_compiled.py

step linear_8b "$python" -m benchmarks.gpu_linear --no-check --json "$out/gpu_linear_8b.json"
step attention_8b "$python" -m benchmarks.gpu_attention --model 8B --json "$out/gpu_attention_8b.json"

sanitizer=$(command -v compute-sanitizer ||
  ls /usr/local/cuda*/{bin,compute-sanitizer}/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  # Small shapes: the sanitizer slows kernels down ten- to a hundredfold. Every tensor is an allocation of its own, so
  # that memcheck sees its bounds. Hopper's asynchronous copies and products apart: racecheck knows them less well.
  small=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --target-processes application-only --error-exitcode 9)
  clean='SUMMARY: 0 (errors|hazards)'
  expect=$clean step memcheck "${small[@]}" --tool memcheck --report-api-errors no "$python" -m benchmarks.gpu_small
  expect=$clean step memcheck_kv "${small[@]}" --tool memcheck --report-api-errors no "${pytest[@]}" \
    $kv/checks_write.py $kv/checks_attention.py -k 'strided_cache or speculative or mixed or more_splits'
  expect=$clean step racecheck "${small[@]}" --tool racecheck "$python" -m benchmarks.gpu_small --kernels others
  expect=$clean step racecheck_wgmma "${small[@]}" --tool racecheck "$python" -m benchmarks.gpu_small --kernels wgmma
else
  for name in memcheck memcheck_kv racecheck racecheck_wgmma; do
    record $name 0 - "compute-sanitizer is not here: not checked"
  done
fi

step linear_70b "$python" -m benchmarks.gpu_linear --no-check --model 70B --tokens 1 --tokens 16 --tokens 64 \
  --tokens 2048 --json "$out/gpu_linear_70b.json"
step quantize "$python" -m benchmarks.gpu_quantize --json "$out/gpu_quantize.json"
step attention_1b "$python" -m benchmarks.gpu_attention --model 1B --context 4096 --json "$out/gpu_attention_1b.json"
exit $failed
