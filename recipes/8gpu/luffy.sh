#!/usr/bin/env bash
# LUFFY (arXiv 2504.14945) on 8 GPUs with stock verl 0.9.1.
# From the paper: objective and n = 8 with one whole demonstration (the preset), model, data. Batch sizes, learning
# rate, lengths and steps (common.sh) are those of HPT's public script for LUFFY. Not run by this project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=luffy
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
