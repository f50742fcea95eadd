#!/usr/bin/env bash
# SFT, then GRPO from its result, on the same file of the CPU testbed.
#   bash recipes/sft_then_rl_cpu.sh TESTBED RUN SFT_STEPS RL_STEPS SEED [verl overrides of the RL phase]
# RUN/sft is what recipes/sft_cpu.sh writes, RUN/rl what recipes/testbed_cpu.sh writes; the first validation of RUN/rl
# is the accuracy after SFT. A finished SFT in RUN/sft is not repeated.
set -euo pipefail
RECIPES=$(dirname "${BASH_SOURCE[0]}")
TESTBED=$1 RUN=$2 SFT_STEPS=$3 RL_STEPS=$4 SEED=$5
shift 5

if [ -e "$RUN/sft/model/config.json" ]; then
    echo "[1/2] SFT: $RUN/sft/model is there"
else
    echo "[1/2] SFT, $SFT_STEPS steps"
    EVALUATE=no bash "$RECIPES/sft_cpu.sh" "$TESTBED" "$RUN/sft" "$SFT_STEPS" "$SEED"
fi
echo "[2/2] GRPO, $RL_STEPS steps"
bash "$RECIPES/testbed_cpu.sh" grpo "$TESTBED" "$RUN/rl" "$RL_STEPS" "$SEED" \
    actor_rollout_ref.model.path="$RUN/sft/model" "$@"
