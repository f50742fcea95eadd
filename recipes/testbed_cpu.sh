#!/usr/bin/env bash
# One training run on the CPU testbed through stock verl, with progress.
#   bash recipes/testbed_cpu.sh METHOD TESTBED RUN STEPS SEED [verl overrides]
# METHOD is a preset of verl_prefix, or `stock_grpo` for verl without any of it; TESTBED is made by `python -m data_prep.testbed`; RUN is the folder to write.
set -euo pipefail
METHOD=$1 TESTBED=$2 RUN=$3 STEPS=$4 SEED=$5
shift 5

# Learning rates: docs/testbed.md
case $METHOD in
    *grpo) LR=3e-4 ;;
    *) LR=1e-3 ;;
esac

DATA=(
    data.train_files="$TESTBED/train.parquet"
    data.val_files="$TESTBED/val.parquet"
    data.max_prompt_length=16
    data.max_response_length=32
    data.train_batch_size=16
    data.seed="$SEED"
    reward.custom_reward_function.path=data_prep/testbed/grader.py
)
ACTOR=(
    actor_rollout_ref.model.path="$TESTBED/model"
    actor_rollout_ref.actor.ppo_mini_batch_size=16
    actor_rollout_ref.actor.use_dynamic_bsz=true
    actor_rollout_ref.actor.optim.lr="$LR"
    'actor_rollout_ref.actor.optim.betas=[0.9,0.95]'
    actor_rollout_ref.actor.optim.weight_decay=0
)
ROLLOUT=(
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.seed="$SEED"
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.do_sample=true
)
if [ "$METHOD" = stock_grpo ]; then
    PREFIX=(algorithm.adv_estimator=grpo)
else
    PREFIX=(+prefix="$METHOD" prefix.seed="$SEED" prefix.schedule.steps=100)
fi
TRAINER=(
    trainer.n_gpus_per_node=1
    trainer.total_training_steps="$STEPS"
    trainer.test_freq=25
    trainer.save_freq="$STEPS"
    trainer.resume_mode=disable
    trainer.default_local_dir="$RUN/checkpoints"
    trainer.rollout_data_dir="$RUN/rollouts"
    trainer.project_name=verl_prefix
    trainer.experiment_name="$METHOD"
    'trainer.logger=[console,file]'
    hydra.run.dir="$RUN/hydra"
)

mkdir -p "$RUN"
case " $* " in
    *" trainer.resume_mode=auto "* | *" trainer.resume_mode=resume_path "*) ;;
    *) rm -f "$RUN"/metrics*.jsonl "$RUN"/rollouts/*.jsonl "$RUN/console.log" ;;
esac
export RAY_worker_niceness=${RAY_worker_niceness:-0} # Ray's 15 lets any other work on the machine starve the run
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a model this small only waits for more threads
export VERL_FILE_LOGGER_PATH=$RUN/metrics.jsonl HYDRA_FULL_ERROR=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python -m verl.trainer.main_ppo \
    "${PREFIX[@]}" "${DATA[@]}" "${ACTOR[@]}" "${ROLLOUT[@]}" "${TRAINER[@]}" "$@" >>"$RUN/console.log" 2>&1 &
TRAINING=$!
trap 'kill $TRAINING 2>/dev/null || true' EXIT
verl-prefix watch "$RUN" --steps "$STEPS" --pid "$TRAINING"
wait "$TRAINING"
trap - EXIT
echo "checkpoint $RUN/checkpoints | metrics $RUN/metrics.jsonl | rollouts $RUN/rollouts/STEP.jsonl | log $RUN/console.log"
