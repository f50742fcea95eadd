#!/usr/bin/env bash
# HPT (arXiv 2509.04419) on 8 GPUs with stock verl 0.9.1.
# From the paper and its public script: objective and 8 own rollouts (the preset), learning rate 5e-6, data, batch
# sizes, lengths and steps of common.sh; SFT weight 0.3 for 1.5B, gate at 2 of 8 for Llama. Not run by this project
# (no GPU).
# Other models of the paper: MODEL_NAME=qwen2.5_math_1.5b, llama3.1_8b.
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=hpt
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ACTOR+=(actor_rollout_ref.actor.optim.lr=5e-6)
case $MODEL_NAME in
    qwen2.5_math_1.5b) ACTOR+=(prefix.sft.weight.initial=0.3) ;;
    llama3.1_8b) ACTOR+=(prefix.gate.max_correct=2) ;;
esac

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
