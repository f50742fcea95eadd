#!/usr/bin/env bash
# Runs a recipe of recipes/8gpu on the CPU testbed for a few steps: the same file, smaller numbers after its own.
#   bash recipes/cpu_overlay.sh RECIPE TESTBED RUN [STEPS] [verl overrides]
# TESTBED is made by `python -m data_prep.testbed`; RUN is the folder to write; STEPS is 2 if it is not a number.
# Smaller: data, model, grader, lengths, prompts, samples in validation, devices. The recipe's own: preset, n, schedules,
# optimiser, two mini-batches a step, loss. What the CPU stack itself needs, the plugin sets.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RECIPE=$1 TESTBED=$2 RUN=$3 STEPS=2
shift 3
if [[ ${1:-} =~ ^[0-9]+$ ]]; then STEPS=$1 && shift; fi

OVERLAY=(
    data.train_files="$TESTBED/train.parquet"
    data.val_files="$TESTBED/val_small.parquet"
    data.max_prompt_length=16
    data.max_response_length=32
    data.train_batch_size=8
    reward.custom_reward_function.path="$ROOT/data_prep/testbed/grader.py"
    actor_rollout_ref.model.path="$TESTBED/model"
    actor_rollout_ref.model.custom_chat_template=null
    actor_rollout_ref.actor.ppo_mini_batch_size=4
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.max_model_len=null
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 # of the machine's memory, which others use as well
    actor_rollout_ref.rollout.val_kwargs.n=1
    trainer.nnodes=1
    trainer.n_gpus_per_node=1
    trainer.total_training_steps="$STEPS"
    trainer.val_before_train=false
    trainer.test_freq="$STEPS"
    trainer.save_freq="$STEPS"
    trainer.resume_mode=disable
    trainer.default_local_dir="$RUN/checkpoints"
    trainer.rollout_data_dir="$RUN/rollouts"
    'trainer.logger=[console,file]'
    hydra.run.dir="$RUN/hydra"
)

mkdir -p "$RUN"
rm -f "$RUN/metrics.jsonl"
export VERL_FILE_LOGGER_PATH=$RUN/metrics.jsonl HYDRA_FULL_ERROR=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
bash "$RECIPE" "${OVERLAY[@]}" "$@" >"$RUN/console.log" 2>&1 &
TRAINING=$!
trap 'kill $TRAINING 2>/dev/null || true' EXIT
verl-prefix watch "$RUN" --steps "$STEPS" --pid "$TRAINING"
wait "$TRAINING"
trap - EXIT
echo "metrics $RUN/metrics.jsonl | rollouts $RUN/rollouts/STEP.jsonl | log $RUN/console.log"
