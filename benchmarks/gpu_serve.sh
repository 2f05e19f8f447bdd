#!/usr/bin/env bash
# Serves ResQ and its rivals with vLLM on a machine with an NVIDIA GPU and without network, stage by stage, each in less
# than 8 minutes:
#
#     benchmarks/gpu_serve.sh correctness|8b|1b|serve [BUNDLE [OPTION...]]
#
# BUNDLE (or $RESQ_BUNDLE): where vLLM comes from, unless $PYTHON (python3) has it: a folder with install_bundle.sh and its
# archives below out/core, which is unpacked into $SITE (results/gpu-serve/site), or a folder of wheels; "" for neither.
# OPTION: of `python -m benchmarks.gpu_serve`, such as --contender resq --cell 64x4096 --checkpoint FOLDER.
# Order of value: correctness, 8b, serve, 1b. Reports go to $OUT (results/gpu-serve), to be committed under
# benchmarks/results/. CUDA kernels are built where nvcc is; elsewhere those of resq_vllm/_C*.abi3.so are used.
#
# Exit status 75: the stage has more to measure and is to be called again; it goes on with the answers that an earlier
# call left in $OUT. On a machine that keeps nothing, bring $OUT's files back and name their folder in $EARLIER.
# $RESQ_COMMIT, or a file commit.txt at the root of the tree, says whose code this is where there is no .git.
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:-}
bundle=${2-${RESQ_BUNDLE:-}}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
work=${WORK:-results/gpu-serve/work}
out=${OUT:-results/gpu-serve}
earlier=${EARLIER:-}
site=${SITE:-$PWD/results/gpu-serve/site}
# Of the 8 minutes: set-up takes its share, and the report needs a moment.
seconds_left() { echo $((SECONDS < 464 ? 465 - SECONDS : 1)); }

case $stage in correctness | 8b | 1b | serve) ;; *)
  echo "gpu_serve.sh: the stage must be correctness, 8b, 1b or serve, not '$stage'." >&2
  exit 2
  ;;
esac
if [ -n "$bundle" ] && [ ! -d "$bundle" ]; then
  echo "gpu_serve.sh: there is no folder $bundle to take vLLM from." >&2
  exit 2
fi
if [ -n "$earlier" ] && [ ! -d "$earlier" ]; then
  echo "gpu_serve.sh: there is no folder $earlier with an earlier call's files." >&2
  exit 2
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu_serve.sh needs an NVIDIA GPU, and nvidia-smi lists none here." >&2
  exit 2
fi
mkdir -p "$work" "$out"
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader | tee "$out/gpu.txt"
RESQ_COMMIT=$(bash benchmarks/gpu_setup.sh commit)
export RESQ_COMMIT
echo "$RESQ_COMMIT" | tee "$out/commit.txt"
if [ -n "$earlier" ]; then
  for file in "$earlier/gpu_serve_$stage".*; do
    # What is in $OUT already is newer.
    [ -f "$file" ] && [ ! -e "$out/${file##*/}" ] && cp "$file" "$out/"
  done
fi

export PYTHON=$python
# within SECONDS WHAT COMMAND...: the steps before the stage have a limit each.
within() {
  local limit=$1 what=$2
  shift 2
  timeout --kill-after=5 "$limit" "$@" && return
  echo "gpu_serve.sh: $what failed, or took longer than $limit s." >&2
  exit 1
}
[ -z "$bundle" ] || within 90 "unpacking vLLM" bash benchmarks/gpu_setup.sh unpack "$bundle" "$site"
# shellcheck disable=SC1091
[ -f "$site/env.sh" ] && . "$site/env.sh"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

within 120 "building the kernels" bash benchmarks/gpu_setup.sh build
# vLLM finds the plugin by the metadata of a distribution on PYTHONPATH.
within 20 "setup.py egg_info" "$python" setup.py -q egg_info
within 40 "loading the kernels" "$python" -c \
  'from resq_vllm import cuda, ops; cuda.require(0); print("CPU ops", ops.isa(), "- CUDA kernels load")'

exec "$python" -m benchmarks.gpu_serve "$stage" --out "$out" --work "$work" --seconds "$(seconds_left)" "$@"
