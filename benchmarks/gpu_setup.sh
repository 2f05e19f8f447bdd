#!/usr/bin/env bash
# Steps that gpu_check.sh and gpu_serve.sh share, for the Python of $PYTHON (python3):
#
#     benchmarks/gpu_setup.sh unpack BUNDLE SITE    vLLM into the folder SITE, once; source SITE/env.sh afterwards
#     benchmarks/gpu_setup.sh build                 resq_vllm/_C*.abi3.so for this machine's GPU
#     benchmarks/gpu_setup.sh commit                prints whose code this is
#
# BUNDLE: a folder with install_bundle.sh and its archives below out/core, or a folder of wheels. CUDA kernels are built
# where nvcc is; elsewhere those of resq_vllm/_C_cuda.abi3.so are used. A CPU library that loads is not built again.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

unpack() {
  local bundle=$1 site=$2
  [ -f "$site/ready" ] && return
  mkdir -p "$site"
  if [ -f "$bundle/install_bundle.sh" ]; then
    PYTHON=$python sh "$bundle/install_bundle.sh" --to "$site" "$bundle/out/core" || return 1
  else
    "$python" -m pip install -q --no-index --find-links "$bundle" --target "$site" vllm openai || return 1
    echo "export PYTHONPATH=$site\${PYTHONPATH:+:\$PYTHONPATH}" >"$site/env.sh"
  fi
  touch "$site/ready"
}

build() {
  local chip
  if ! "$python" -c 'from resq_vllm import ops; ops.isa()' 2>/dev/null; then
    RESQ_CUDA=0 "$python" setup.py -q build_ext --inplace || return 1
  fi
  if ! "$python" -c 'import sys; from tools import cuda_build; sys.exit(cuda_build.find_nvcc() is None)'; then
    echo "nvcc is not here: resq_vllm/_C_cuda.abi3.so is used as it is"
    return
  fi
  # Only this chip's code: the build is then a fraction of the full one.
  chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  case $chip in 90) chip=90a ;; esac
  RESQ_CUDA_ARCHS=${RESQ_CUDA_ARCHS:-sm_$chip} "$python" -m tools.cuda_build
}

# $RESQ_COMMIT; else the repository's, with -dirty where there are uncommitted changes; else the file commit.txt.
commit() {
  local found=${RESQ_COMMIT:-}
  if [ -z "$found" ] && [ -e .git ]; then
    found=$(git describe --always --dirty --abbrev=40 --exclude '*')
  elif [ -z "$found" ]; then
    found=$(cat commit.txt 2>/dev/null)
  fi
  echo "${found:-unknown: no .git, no \$RESQ_COMMIT, no commit.txt}"
}

case ${1:-} in
unpack | build | commit) "$@" ;;
*)
  echo "gpu_setup.sh: the step must be unpack, build or commit, not '${1:-}'." >&2
  exit 2
  ;;
esac
