#!/usr/bin/env bash
# Llama-3.1-8B, as in Prefix-RFT and HPT. Prefix-RFT trains it on the rows whose demonstration has at most 2048 tokens:
# give such a file as TRAIN. A base model has no chat template; this one is ours.
# Its smaller relatives: MODEL_PATH=meta-llama/Llama-3.2-3B.
set -euo pipefail
TEMPLATE='{% for m in messages %}Question: {{ m.content }}{{ "\n" }}{% endfor %}Answer:'
MODEL=(
    actor_rollout_ref.model.path="${MODEL_PATH:-meta-llama/Llama-3.1-8B}"
    actor_rollout_ref.model.custom_chat_template="'$TEMPLATE'"
    data.max_response_length=8192
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.max_model_len=9216 # prompt and response; not the 128k it could do
)
