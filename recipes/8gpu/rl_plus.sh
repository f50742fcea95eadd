#!/usr/bin/env bash
# RL-PLUS (arXiv 2508.00222) on 8 GPUs with stock verl 0.9.1.
# From the paper: the objective (the preset), the model. From its public script: n = 8, batch sizes, learning rate and
# lengths, which are those of common.sh. Ours: the number of steps. Not run by this project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=rl_plus
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
