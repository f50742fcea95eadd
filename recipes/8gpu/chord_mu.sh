#!/usr/bin/env bash
# CHORD-mu (arXiv 2508.11408) on 8 GPUs with stock verl 0.9.1.
# From the paper: objective and schedule (the preset), the model. From its public example (Trinity-RFT, mix_chord): 32
# prompts x 8 rollouts, one update a step, 10240 tokens. There 64 expert rows a step come from a set of their own;
# here each prompt brings its demonstration. Ours: learning rate and steps (common.sh). Not run by this project (no
# GPU).
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=chord_mu
MODEL_NAME=${MODEL_NAME:-qwen2.5_7b_instruct} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DATA+=(data.train_batch_size=32)
ACTOR+=(actor_rollout_ref.actor.ppo_mini_batch_size=32)

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
