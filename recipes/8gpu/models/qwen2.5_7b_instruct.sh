#!/usr/bin/env bash
# Qwen2.5-7B-Instruct, as in CHORD.
set -euo pipefail
MODEL=(
    actor_rollout_ref.model.path="${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}"
    data.max_response_length=10240
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=22528
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
)
