#!/usr/bin/env bash
# Prefix-RFT as published (arXiv 2507.01679, Sec. 4.1): Qwen2.5-Math-7B, one node of 8 GPUs, stock verl 0.9.1.
# Not run by this project (no GPU): the overrides are checked to compose, the stack runs on the CPU testbed.
set -euo pipefail

# ---- edit here ----
MODEL=${MODEL:-Qwen/Qwen2.5-Math-7B} # with rope_theta 40000 and 16k positions in its config.json, as in the paper
TRAIN=${TRAIN:-data/openr1_math_46k/train.parquet} # verl's columns plus `demos` (list<string>)
VAL=${VAL:-data/aime24/test.parquet}
OUT=${OUT:-runs/prefix_rft_qwen2.5_math_7b}
# -------------------

DATA=(
    data.train_files="$TRAIN"
    data.val_files="$VAL"
    data.max_prompt_length=1024
    data.max_response_length=8192
    data.train_batch_size=128
)
ACTOR=(
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.use_dynamic_bsz=true
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.7
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.n=32
)
TRAINER=(
    trainer.n_gpus_per_node=8
    trainer.total_training_steps=500
    trainer.total_epochs=100
    trainer.test_freq=25
    trainer.save_freq=50
    trainer.default_local_dir="$OUT/checkpoints"
    trainer.rollout_data_dir="$OUT/rollouts"
    trainer.project_name=verl_prefix
    trainer.experiment_name=prefix_rft_qwen2.5_math_7b
)

python -m verl.trainer.main_ppo +prefix=prefix_rft "${DATA[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@"
