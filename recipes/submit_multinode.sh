#!/usr/bin/env bash
# Submits a recipe of recipes/8gpu to a Ray cluster of several nodes.
#   NNODES=4 RAY_API_SERVER_ADDRESS=http://HEAD:8265 TRAIN=/shared/train.parquet VAL=/shared/val.parquet \
#       OUT=/shared/runs/luffy MODEL_PATH=/shared/models/Qwen2.5-Math-7B-16k \
#       bash recipes/submit_multinode.sh recipes/8gpu/luffy.sh [verl overrides]
# Every node needs verl 0.9.1 and this package's dependencies (simplest: `pip install` this clone on each). Ray carries this
# clone to all of them, so all run the same version of it; VERL_USE_EXTERNAL_MODULES makes verl fail where the plugin
# cannot be imported instead of training without it. Not run on a cluster by this project.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { echo "submit_multinode.sh: $*" >&2; exit 2; }
[ $# -ge 1 ] || fail "which recipe? See the head of this file."
RECIPE=$(realpath --relative-to="$ROOT" "$1")
shift
[ -f "$ROOT/$RECIPE" ] && [[ $RECIPE != ../* ]] || fail "$RECIPE is not a file of $ROOT, which is what the nodes get."

# ---- edit here, or set the variables ----
ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
NNODES=${NNODES:-2}
# which kind of accelerator the nodes have; without it a head node without any would choose the CPU platform
export VERL_PLATFORM=${VERL_PLATFORM:-nvidia}
# variables handed on if they are set. PASS adds to them; Ray's dashboard shows their values, so put no secrets there
NAMES=(PRESET MODEL_NAME MODEL_PATH TRAIN VAL OUT VERL_PLATFORM HF_HOME HF_HUB_OFFLINE WANDB_MODE ${PASS:-})
# -----------------------------------------

for name in TRAIN VAL OUT; do # the job runs in a copy of this clone that is deleted afterwards
    value=${!name:-}
    [[ $value == /* || $value == *://* ]] || fail "$name='$value': give an absolute path that every node sees."
done
if [[ -z ${MODEL_PATH:-} || ($MODEL_PATH != /* && -d $MODEL_PATH) ]]; then
    fail "MODEL_PATH='${MODEL_PATH:-}': give an absolute path that every node sees, or a model of the hub."
fi

export VERL_USE_EXTERNAL_MODULES=verl_prefix.plugin
RUNTIME_ENV=$(python - "${NAMES[@]}" VERL_USE_EXTERNAL_MODULES <<'PY'
import json, os, sys

# verl hands these to ray.init itself, and Ray refuses a job that names one of them twice
TAKEN = """TRANSFER_QUEUE_ENABLE VERL_FULL_DETERMINISM VLLM_BATCH_INVARIANT VERL_RL_INSIGHT_ENABLE PYTHONHASHSEED
CUBLAS_WORKSPACE_CONFIG FLASH_ATTENTION_DETERMINISTIC NCCL_DETERMINISTIC NCCL_ALGO NVTX_INJECTION64_PATH""".split()
if twice := sorted(set(TAKEN) & set(sys.argv[1:])):
    sys.exit(f"submit_multinode.sh: PASS={' '.join(twice)}: verl handles that itself; set it on the nodes.")
# beside what .gitignore names, which Ray leaves out by itself
excludes = [".git", "/data/", "/models/", "/docs/", "/tests/", "/benchmarks/"]
print(json.dumps({
    "env_vars": {name: os.environ[name] for name in sys.argv[1:] if name in os.environ},
    "excludes": excludes,
}))
PY
)

COMMAND=()
for word in bash "$RECIPE" trainer.nnodes="$NNODES" "$@"; do # Ray joins the words and gives them to a shell
    [[ $word != *[[:space:]\"]* ]] || fail "$word: Ray cannot carry blanks or double quotes in an override."
    COMMAND+=("$(printf '%q' "$word")")
done
exec ray job submit --address "$ADDRESS" --working-dir "$ROOT" --runtime-env-json "$RUNTIME_ENV" -- "${COMMAND[@]}"
