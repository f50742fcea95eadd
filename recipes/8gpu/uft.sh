#!/usr/bin/env bash
# UFT (arXiv 2505.16984) on 8 GPUs with stock verl 0.9.1.
# From the paper and its public script: objective, n = 4, hints until step 300 of 500 (the preset), small models, 256
# prompts, mini-batches of 64, learning rate 1e-6, 1024 tokens. TRAIN wants its tasks (Countdown, MATH, Knights and
# Knaves) with their worked solutions as `demos`. Ours: 8 GPUs (they used 2 to 4), the validation. Not run by this
# project (no GPU).
# Other models of the paper: MODEL_PATH=Qwen/Qwen2.5-1.5B or Qwen/Qwen2.5-0.5B; MODEL_NAME=llama3.1_8b
# MODEL_PATH=meta-llama/Llama-3.2-3B.
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=uft
MODEL_NAME=${MODEL_NAME:-qwen2.5_3b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA+=(data.train_batch_size=256)
MODEL+=(data.max_response_length=1024)

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
