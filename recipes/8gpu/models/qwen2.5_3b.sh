#!/usr/bin/env bash
# Qwen2.5-3B, as in UFT. The smaller ones of that paper: MODEL_PATH=Qwen/Qwen2.5-1.5B or Qwen/Qwen2.5-0.5B.
set -euo pipefail
MODEL=(
    actor_rollout_ref.model.path="${MODEL_PATH:-Qwen/Qwen2.5-3B}"
    data.max_response_length=8192
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
)
