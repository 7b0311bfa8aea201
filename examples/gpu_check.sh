#!/usr/bin/env bash
# Everything that only GPUs can show, on those of this machine (1, 2, 4 or 8 of them): every family against transformers,
# layouts over NCCL in fp32, bf16 and FP8, the backends against each other, and a table of throughput.
#   examples/gpu_check.sh [FOLDER] [arguments of pytest, e.g. -k layouts]
# FOLDER (runs/gpu_check) gets gpu_report.json and gpu_report.html, also when a check fails. Without a GPU everything is
# skipped, and both say why. PYTHON names the interpreter; it needs the packages of requirements/dev.txt. docs/gpu.md
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-runs/gpu_check}
default_python=python3
if [ -x .venv/bin/python ]; then
    default_python=.venv/bin/python
fi

export MEGAVLM_GPU_REPORT="$folder"
export MEGAVLM_NO_EVIDENCE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Kernels start in the order of their launches, which tensor and context parallelism need to overlap messages.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

status=0
"${PYTHON:-$default_python}" -m pytest tests/gpu -rs "${@:2}" || status=$?
echo "written: $folder/gpu_report.json $folder/gpu_report.html"
exit "$status"
