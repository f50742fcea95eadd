#!/usr/bin/env bash
# SuperRL (arXiv 2506.01096) on 8 GPUs with stock verl 0.9.1.
# From the paper: the objective (the preset). Ours: model and setting, which are those of Prefix-RFT, so that methods
# compare.
# Not run by this project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=superrl
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
