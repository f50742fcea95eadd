#!/usr/bin/env bash
# The evaluation of Prefix-RFT (arXiv 2507.01679): T = 0.6, 8192 tokens; avg@32 on AIME24, AIME25 and AMC, one sample a
# problem on the others. AMC is amc23's 40 problems; the paper's, LUFFY's, has 83: `verl-prefix data convert` takes that
# file as well. Converts each set once, then samples on every GPU of this machine. Killed: run it again.
#   MODEL=runs/prefix_rft/checkpoints/global_step_500/merged bash recipes/eval_paper.sh [options of verl-prefix eval]
# Not run by this project (no GPU, no hub); what it calls is tested.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- edit here, or set the variables ----
MODEL=${MODEL:-models/Qwen2.5-Math-7B-16k}  # Hugging Face folder, or global_step_N with a Hugging Face export
DATA=${DATA:-data/eval}                     # converted sets
OUT=${OUT:-runs/eval_${MODEL//\//_}}        # samples.jsonl, summary.json
GPUS=${GPUS:-8}                             # one vLLM engine on each
# gpqa-diamond is gated: log in to the hub first, or leave it out
SETS=${SETS:-aime24 aime25 amc23 math500 minerva olympiadbench arc-challenge gpqa-diamond mmlu-pro}
SAMPLES=${SAMPLES:-32}                      # of the three small sets
# -----------------------------------------

mkdir -p "$DATA"
FILES=() N_OF=()
for set in $SETS; do
    [ -f "$DATA/$set.parquet" ] || verl-prefix data convert --source "$set" --out "$DATA/$set.parquet"
    FILES+=("$DATA/$set.parquet")
    case $set in aime24 | aime25 | amc23) N_OF+=(--n-of "$set=$SAMPLES") ;; esac
done
exec verl-prefix eval "${FILES[@]}" --model "$MODEL" --out "$OUT" "${N_OF[@]}" \
    --temperature 0.6 --max-tokens 8192 --serve-args "--data-parallel-size $GPUS" "$@"
