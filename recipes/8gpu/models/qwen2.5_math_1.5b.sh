#!/usr/bin/env bash
# Qwen2.5-Math-1.5B with rope_theta 40000 and 16k positions, as in Prefix-RFT and HPT. Make that copy once:
#   verl-prefix extend-context Qwen2.5-Math-1.5B models/Qwen2.5-Math-1.5B-16k --rope-theta 40000 --positions 16384
set -euo pipefail
MODEL=(
    actor_rollout_ref.model.path="${MODEL_PATH:-models/Qwen2.5-Math-1.5B-16k}"
    data.max_response_length=8192
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
)
