#!/usr/bin/env bash
# Prefix-RFT (arXiv 2507.01679, Sec. 4.1) on 8 GPUs with stock verl 0.9.1.
# From the paper: model, data, lengths, batch sizes, n = 8, learning rate, steps (common.sh and the preset). Not run
# by this project (no GPU). Other models of the paper: MODEL_NAME=qwen2.5_math_1.5b, llama3.1_8b, qwen3_1.7b_base.
# Ablations of Sec. 4.3 run from this file:
#   PRESET=prefix_rft_no_clip, or _frozen, _static, _top50, _top80, _random, _bottom, _uniform, _10_percent, _shared
#   1 % of the demonstrations: PRESET=prefix_rft_10_percent and the override prefix.demonstrations.demo_ratio=0.01
#   weaker demonstrations: TRAIN=a file with others
# Seven prefixes of eight rollouts and an SFT term, ours (docs/comparison.md): PRESET=prefix_rft_sft
set -euo pipefail

# ---- edit here (data and output: common.sh) ----
PRESET=${PRESET:-prefix_rft}
MODEL_NAME=${MODEL_NAME:-qwen2.5_math_7b} # a file of models/; MODEL_PATH=... if the weights lie elsewhere
# ------------------------------------------------

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec python -m verl.trainer.main_ppo +prefix="$PRESET" \
    "${DATA[@]}" "${MODEL[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
