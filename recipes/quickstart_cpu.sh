#!/usr/bin/env bash
# From nothing to a learned task on a CPU: environment, testbed, training with stock verl, summary, picture and a page with the rollouts.
#   bash recipes/quickstart_cpu.sh                 Prefix-RFT
#   bash recipes/quickstart_cpu.sh --grpo          plain GRPO on the same model, data and budget
# Options: --steps N, --seed N, --out DIR; everything after `--` goes to verl as overrides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

METHOD=prefix_rft STEPS=125 SEED=0 OUT=runs/quickstart
while [ $# -gt 0 ]; do
    case $1 in
        --grpo) METHOD=grpo ;;
        --steps) STEPS=$2; shift ;;
        --seed) SEED=$2; shift ;;
        --out) OUT=$2; shift ;;
        --) shift; break ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
    shift
done
VENV=${VENV:-$PWD/.venv}
BEGIN=$(date +%s)

echo "[1/3] environment"
VENV=$VENV bash recipes/setup_cpu.sh
# shellcheck disable=SC1091
source "$VENV/bin/activate"

echo "[2/3] testbed: data and base model"
TESTBED=$OUT/testbed_seed$SEED
python -m data_prep.testbed --out "$TESTBED" --seed "$SEED"

echo "[3/3] $METHOD, $STEPS steps"
RUN=$OUT/${METHOD}_seed$SEED
bash recipes/testbed_cpu.sh "$METHOD" "$TESTBED" "$RUN" "$STEPS" "$SEED" "$@"
RUNS=()
for file in "$OUT"/*_seed"$SEED"/metrics.jsonl; do RUNS+=("$(dirname "$file")"); done
verl-prefix compare "${RUNS[@]}" --picture "$OUT/learning_curves.png"
verl-prefix report "${RUNS[@]}" --out "$OUT/report.html"
echo "whole command: $(( ($(date +%s) - BEGIN) / 60 )) min $(( ($(date +%s) - BEGIN) % 60 )) s"
