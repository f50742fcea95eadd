#!/usr/bin/env bash
# avg@k and pass@k of a model on the CPU testbed, through a vLLM server on the CPU (about a minute).
#   bash recipes/eval_cpu.sh TESTBED MODEL OUT [options of verl-prefix eval]
# TESTBED is made by `python -m data_prep.testbed`; MODEL is a folder in Hugging Face format, e.g. TESTBED/model.
# recipes/evaluate_cpu.sh gives the same accuracy through verl's validation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 3 ] || { echo "usage: bash recipes/eval_cpu.sh TESTBED MODEL OUT [options of verl-prefix eval]" >&2; exit 2; }
command -v verl-prefix >/dev/null || { echo "verl-prefix is not on the PATH: source .venv/bin/activate" >&2; exit 2; }
TESTBED=$1 MODEL=$2 OUT=$3
shift 3
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
exec verl-prefix eval "$TESTBED/val.parquet" --model "$MODEL" --out "$OUT" \
    --temperature 1 --max-tokens 32 --grader data_prep/testbed/grader.py "$@"
