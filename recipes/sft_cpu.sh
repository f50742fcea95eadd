#!/usr/bin/env bash
# SFT on the CPU testbed through verl's own SFT trainer, then held-out accuracy of the model that it made.
#   bash recipes/sft_cpu.sh TESTBED RUN STEPS SEED [verl overrides]     DFT: sft.loss=dft
# TESTBED is made by `python -m data_prep.testbed`; RUN is the folder to write. The model is RUN/model (Hugging Face
# format), the losses are in RUN/metrics.jsonl, the accuracy in RUN/eval/metrics.jsonl (EVALUATE=no leaves it out).
set -euo pipefail
RECIPES=$(dirname "${BASH_SOURCE[0]}")
TESTBED=$1 RUN=$2 STEPS=$3 SEED=$4
shift 4

DATA=(
    data.train_files="$TESTBED/train.parquet"
    data.max_length=48
    data.train_batch_size=64
    data.seed="$SEED"
)
OPTIM=(
    optim.lr=1e-3 # docs/testbed.md
    'optim.betas=[0.9,0.95]'
    optim.weight_decay=0
)
TRAINER=(
    trainer.total_training_steps="$STEPS"
    trainer.total_epochs="$STEPS" # the steps decide
    trainer.resume_mode=disable
    'checkpoint.save_contents=[model,optimizer,extra,hf_model]'
    trainer.default_local_dir="$RUN/checkpoints"
    trainer.project_name=verl_prefix
    trainer.experiment_name=sft
    'trainer.logger=[console,file]'
    hydra.run.dir="$RUN/hydra"
)
# What a CPU needs: FSDP2, sdpa, fp32, no compiler, data in the trainer's own process
CPU=(
    trainer.device=cpu
    engine.strategy=fsdp2
    '+engine.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}'
    engine.use_torch_compile=false
    +model.override_config.attn_implementation=sdpa
    model.use_remove_padding=false
    model.enable_gradient_checkpointing=false
    data.num_workers=0
)

mkdir -p "$RUN"
rm -rf "$RUN/model" "$RUN/checkpoints" "$RUN/metrics.jsonl"
export VERL_FILE_LOGGER_PATH=$RUN/metrics.jsonl HYDRA_FULL_ERROR=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a model this small only waits for more threads
torchrun --standalone --nproc_per_node=1 -m verl.trainer.sft_trainer +sft=sft model.path="$TESTBED/model" \
    "${DATA[@]}" "${OPTIM[@]}" "${TRAINER[@]}" "${CPU[@]}" "$@" >"$RUN/console.log" 2>&1 &
TRAINING=$!
trap 'kill $TRAINING 2>/dev/null || true' EXIT
verl-prefix watch "$RUN" --steps "$STEPS" --pid "$TRAINING"
wait "$TRAINING"
trap - EXIT
ln -sfn "checkpoints/global_step_$(cat "$RUN/checkpoints/latest_checkpointed_iteration.txt")/huggingface" "$RUN/model"
echo "model $RUN/model | metrics $RUN/metrics.jsonl | log $RUN/console.log"
if [ "${EVALUATE:-yes}" != no ]; then
    bash "$RECIPES/evaluate_cpu.sh" "$TESTBED" "$RUN/model" "$RUN/eval" "$SEED"
fi
