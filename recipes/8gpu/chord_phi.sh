#!/usr/bin/env bash
# CHORD-phi (arXiv 2508.11408) on 8 GPUs with stock verl 0.9.1. Setting and what is ours: chord_mu.sh; they differ in
# the preset.
# Not run by this project (no GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=chord_phi
MODEL_NAME=${MODEL_NAME:-qwen2.5_7b_instruct} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA+=(data.train_batch_size=32)
ACTOR+=(actor_rollout_ref.actor.ppo_mini_batch_size=32)

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
