#!/usr/bin/env bash
# SFT, then GRPO from its result, on the same file: Qwen2.5-Math-7B, one node of 8 GPUs, stock verl 0.9.1. The strongest
# row of arXiv 2604.23747: 57.0 on six sets after 500 RL steps. The RL phase is recipes/8gpu/grpo.sh, whose batch and
# learning rate are those of Prefix-RFT, so that the two can be compared; overrides go to this phase.
# Phase 1 is not repeated once OUT/sft/model exists; an interrupted one resumes from its last checkpoint.
# Not run by this project (no GPU): the overrides are checked to compose, the stack runs on the CPU testbed.
set -euo pipefail

# ---- edit here ----
export MODEL=${MODEL:-models/Qwen2.5-Math-7B-16k} # longer context as in the paper: docs/recipes.md
export TRAIN=${TRAIN:-data/openr1_46k.parquet} # verl's columns plus `demos` (list<string>)
VAL=${VAL:-data/aime24.parquet}
OUT=${OUT:-runs/sft_then_rl_qwen2.5_math_7b}
# -------------------

if [ ! -e "$OUT/sft/model/config.json" ]; then
    OUT="$OUT/sft" bash "$(dirname "${BASH_SOURCE[0]}")/sft_qwen2.5_math_7b.sh"
fi

MODEL_PATH="$OUT/sft/model" MODEL_NAME=qwen2.5_math_7b TRAIN="$TRAIN" VAL="$VAL" OUT="$OUT/rl" \
    exec bash "$(dirname "${BASH_SOURCE[0]}")/8gpu/grpo.sh" trainer.experiment_name=sft_then_rl_qwen2.5_math_7b "$@"
