#!/usr/bin/env bash
# Dr.GRPO (arXiv 2503.20783) through the plugin's seam, without demonstrations, on 8 GPUs with stock verl 0.9.1: the
# RFT baseline of Prefix-RFT (arXiv 2507.01679), with that paper's setting (common.sh). Not run by this project (no
# GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=dr_grpo
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
