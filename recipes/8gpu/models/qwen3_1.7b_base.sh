#!/usr/bin/env bash
# Qwen3-1.7B-Base, as in Prefix-RFT.
set -euo pipefail
MODEL=(
    actor_rollout_ref.model.path="${MODEL_PATH:-Qwen/Qwen3-1.7B-Base}"
    data.max_response_length=8192
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
)
