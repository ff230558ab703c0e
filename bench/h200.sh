#!/usr/bin/env bash
# Proves and times the kernels on one NVIDIA GPU within so many seconds: bench/h200.sh [SECONDS]
# Results go to $OUT (out/h200). Without a GPU the same runs on tiny shapes in Triton's interpreter. $PYTHON: the Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi >/dev/null 2>&1 || export TRITON_INTERPRET=1
exec "${PYTHON:-python3}" bench/h200.py --seconds "${1:-540}" --out "${OUT:-out/h200}"
