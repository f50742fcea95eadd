#!/usr/bin/env bash
# Qwen2.5-Math-7B with rope_theta 40000 and 16k positions, as in Prefix-RFT, LUFFY and HPT. Make that copy once:
#   verl-prefix extend-context Qwen2.5-Math-7B models/Qwen2.5-Math-7B-16k --rope-theta 40000 --positions 16384
set -euo pipefail
MODEL=(
    actor_rollout_ref.model.path="${MODEL_PATH:-models/Qwen2.5-Math-7B-16k}"
    data.max_response_length=8192
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
)
