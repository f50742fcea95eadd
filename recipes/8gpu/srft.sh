#!/usr/bin/env bash
# SRFT (arXiv 2506.19767) on 8 GPUs with stock verl 0.9.1.
# From the paper: the objective and 8 own rollouts beside the demonstration (the preset), the model. The setting of
# common.sh is that of HPT's public script for SRFT. The entropy's sign of SRFT's own code: prefix.sft.entropy_sign=1.
# Not run by this project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=srft
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
