#!/usr/bin/env bash
# SFT on the demonstrations that RL trains on: Qwen2.5-Math-7B, one node of 8 GPUs, stock verl 0.9.1. The baseline as
# corrected in arXiv 2604.23747: global token mean, nothing offloaded. Batch 64, 3 epochs and lr 5e-5 are LUFFY's
# (2504.14945); warm-up, schedule and betas are common choices that were not checked against either paper.
# Not run by this project (no GPU): the overrides are checked to compose, the stack runs on the CPU testbed.
set -euo pipefail

# ---- edit here ----
MODEL=${MODEL:-models/Qwen2.5-Math-7B-16k} # longer context as in the paper: docs/recipes.md
TRAIN=${TRAIN:-data/openr1_46k.parquet} # verl's columns plus `demos` (list<string>), as for RL
OUT=${OUT:-runs/sft_qwen2.5_math_7b} # the model is OUT/model, in Hugging Face format
# -------------------

DATA=(
    data.train_files="$TRAIN"
    data.max_length=9216 # RL's 1024 + 8192
    data.train_batch_size=64
    data.use_dynamic_bsz=true
    data.max_token_len_per_gpu=18432
)
MODEL_ENGINE=(
    model.path="$MODEL"
    model.use_remove_padding=true
    model.enable_gradient_checkpointing=true
    engine.strategy=fsdp2
)
OPTIM=(
    optim.lr=5e-5
    optim.lr_scheduler_type=cosine
    optim.lr_warmup_steps_ratio=0.1
    optim.min_lr_ratio=0.1
    'optim.betas=[0.9,0.95]'
    optim.weight_decay=0
    optim.clip_grad=1.0
)
TRAINER=(
    trainer.n_gpus_per_node=8
    trainer.total_epochs=3
    trainer.save_freq=after_each_epoch
    trainer.max_ckpt_to_keep=1
    'checkpoint.save_contents=[model,optimizer,extra,hf_model]'
    trainer.default_local_dir="$OUT/checkpoints"
    trainer.project_name=verl_prefix
    trainer.experiment_name=sft_qwen2.5_math_7b
)

torchrun --standalone --nproc_per_node=8 -m verl.trainer.sft_trainer +sft=sft \
    "${DATA[@]}" "${MODEL_ENGINE[@]}" "${OPTIM[@]}" "${TRAINER[@]}" "$@"
ln -sfn "checkpoints/global_step_$(cat "$OUT/checkpoints/latest_checkpointed_iteration.txt")/huggingface" "$OUT/model"
echo "model $OUT/model"
