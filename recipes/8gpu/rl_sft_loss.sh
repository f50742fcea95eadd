#!/usr/bin/env bash
# RL with an SFT loss, the baseline of LUFFY (arXiv 2504.14945) and Prefix-RFT (arXiv 2507.01679), on 8 GPUs, stock
# verl 0.9.1.
# From the papers: the objective (the preset). Ours: that everything else is Prefix-RFT's setting (common.sh). Not run
# by this project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=rl_sft_loss
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
