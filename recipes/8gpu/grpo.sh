#!/usr/bin/env bash
# GRPO (arXiv 2402.03300) through the plugin's seam, without demonstrations, on 8 GPUs with stock verl 0.9.1: a
# control.
# From the paper: the objective (the preset). Ours: model and setting, which are those of Prefix-RFT. Not run by this
# project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=grpo
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
