#!/usr/bin/env bash
# What the recipes of this folder share; they source it. Setting of Prefix-RFT (arXiv 2507.01679, Sec. 4.1):
# OpenR1-Math-46k-8192, 128 prompts, mini-batches of 64, AdamW 1e-6, weight decay 0.01, 500 steps; T = 0.6 in tests.
# HPT's public scripts for HPT, LUFFY and SRFT have the same batch sizes, lengths and steps.
# Ours: what stands under "memory and speed", how often it validates and saves. Not run by this project (no GPU).
set -euo pipefail

# ---- edit here, or set the variables ----
TRAIN=${TRAIN:-data/openr1_46k.parquet}  # verl's columns plus `demos` (list<string>)
VAL=${VAL:-data/aime24.parquet}          # without `demos`
OUT=${OUT:-runs/${PRESET}_${MODEL_NAME}} # checkpoints and rollouts
# -----------------------------------------

# MODEL: path, response length, memory
MODELS=$(dirname "${BASH_SOURCE[0]}")/models
if [ ! -f "$MODELS/$MODEL_NAME.sh" ]; then
    echo "MODEL_NAME=$MODEL_NAME: no such file in $MODELS, which has: $(cd "$MODELS" && ls | sed 's/\.sh$//' | xargs)" >&2
    exit 2
fi
# shellcheck source=/dev/null
source "$MODELS/$MODEL_NAME.sh"

DATA=(
    data.train_files="$TRAIN"
    data.val_files="$VAL"
    data.max_prompt_length=1024
    data.train_batch_size=128
    reward.custom_reward_function.path=pkg://verl_prefix.reward # docs/grader.md
    reward.custom_reward_function.name=compute_score
)
ACTOR=(
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.weight_decay=0.01
    actor_rollout_ref.actor.grad_clip=1.0
    # memory and speed
    actor_rollout_ref.actor.use_dynamic_bsz=true
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
    actor_rollout_ref.rollout.val_kwargs.n=32
    # memory and speed
    actor_rollout_ref.rollout.gpu_memory_utilization=0.7
)
TRAINER=(
    trainer.nnodes=1
    trainer.n_gpus_per_node=8
    trainer.total_training_steps=500
    trainer.total_epochs=100 # the number of steps decides
    trainer.test_freq=25
    trainer.save_freq=50
    trainer.default_local_dir="$OUT/checkpoints"
    trainer.rollout_data_dir="$OUT/rollouts"
    trainer.project_name=verl_prefix
    trainer.experiment_name="${PRESET}_$MODEL_NAME"
    'trainer.logger=[console,file]' # verl's default, wandb, waits for a login
)
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$OUT/metrics.jsonl}
mkdir -p "$(dirname "$VERL_FILE_LOGGER_PATH")"
