#!/usr/bin/env bash
# Methods side by side on the CPU testbed through stock verl: same base model, data, prompts and updates.
#   bash recipes/compare_cpu.sh METHODS SEEDS [--steps N] [--out DIR] [--results DIR]
#   bash recipes/compare_cpu.sh "grpo prefix_rft" "11 12 13"
# METHODS are names of benchmarks/study/methods.yaml, where their settings are. A finished run is one JSON file in
# OUT/results (default runs/study/results) and is not repeated; an interrupted one goes on from its last checkpoint (an SFT
# phase, which takes a minute, from its beginning). About 10 minutes a run on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-$PWD/.venv}
VENV=$VENV bash recipes/setup_cpu.sh
# shellcheck disable=SC1091
source "$VENV/bin/activate"
exec python -m benchmarks.study.run "$@"
