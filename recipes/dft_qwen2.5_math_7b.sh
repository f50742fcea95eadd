#!/usr/bin/env bash
# DFT (arXiv 2508.05629): Qwen2.5-Math-7B, 100k problems of NuminaMath-CoT, one epoch, batch 256, lr 5e-5 with cosine
# decay and 10 % warm-up, 2048 tokens; after the authors' public script for 1.5B, not checked against the paper for 7B.
# One node of 8 GPUs, stock verl 0.9.1. For a comparison
# with SFT on the demonstrations of the RL recipes: bash recipes/sft_qwen2.5_math_7b.sh sft.loss=dft
# Not run by this project (no GPU): the overrides are checked to compose, the stack runs on the CPU testbed.
set -euo pipefail

# ---- edit here ----
MODEL=${MODEL:-Qwen/Qwen2.5-Math-7B}
TRAIN=${TRAIN:-data/numina_cot_100k/train.parquet} # verl's columns plus `demos` (list<string>), or `messages`
OUT=${OUT:-runs/dft_qwen2.5_math_7b} # the model is OUT/model, in Hugging Face format
# -------------------

DATA=(
    data.train_files="$TRAIN"
    data.max_length=2048
    data.train_batch_size=256
    data.use_dynamic_bsz=true
    data.max_token_len_per_gpu=16384
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
    optim.weight_decay=0.01
    optim.clip_grad=1.0
)
TRAINER=(
    trainer.n_gpus_per_node=8
    trainer.total_epochs=1
    trainer.save_freq=100
    trainer.max_ckpt_to_keep=1
    'checkpoint.save_contents=[model,optimizer,extra,hf_model]'
    trainer.default_local_dir="$OUT/checkpoints"
    trainer.project_name=verl_prefix
    trainer.experiment_name=dft_qwen2.5_math_7b
)

torchrun --standalone --nproc_per_node=8 -m verl.trainer.sft_trainer +sft=dft \
    "${DATA[@]}" "${MODEL_ENGINE[@]}" "${OPTIM[@]}" "${TRAINER[@]}" "$@"
ln -sfn "checkpoints/global_step_$(cat "$OUT/checkpoints/latest_checkpointed_iteration.txt")/huggingface" "$OUT/model"
echo "model $OUT/model"
