#!/usr/bin/env bash
# Held-out accuracy of a model on the CPU testbed: the validation of a training run, without the training.
#   bash recipes/evaluate_cpu.sh TESTBED MODEL RUN SEED [verl overrides]
# MODEL is a folder in Hugging Face format. The result is step 0 of RUN/metrics.jsonl (val-core/...).
set -euo pipefail
TESTBED=$1 MODEL=$2 RUN=$3 SEED=$4
shift 4
bash "$(dirname "${BASH_SOURCE[0]}")/testbed_cpu.sh" grpo "$TESTBED" "$RUN" 0 "$SEED" \
    actor_rollout_ref.model.path="$MODEL" trainer.val_only=true "$@"
