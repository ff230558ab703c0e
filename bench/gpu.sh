#!/usr/bin/env bash
# Proves and times the kernels on one NVIDIA GPU, in three stages: bench/gpu.sh 1|2|3 [SECONDS]  (bench/gpu.py)
# Results go to $OUT (out/gpu). Without a GPU the same runs on tiny shapes in Triton's interpreter. $PYTHON: the Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi >/dev/null 2>&1 || export TRITON_INTERPRET=1
exec "${PYTHON:-python3}" bench/gpu.py --stage "${1:?1, 2 or 3}" ${2:+--seconds "$2"} --out "${OUT:-out/gpu}"
