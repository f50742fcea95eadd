#!/usr/bin/env bash
# Step time of plain GRPO against Prefix-RFT with the same batch, on the CPU testbed, one after the other in one run.
#   bash benchmarks/bench_step_time.sh [STEPS] [OUT]
# Plain GRPO is measured twice: stock verl without the plugin's trainer (`stock`), and with verl's 2 s poll replaced by
# the plugin's (`+prefix=grpo`), so that the ratio says what prefixes cost and not what the poll does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
STEPS=${1:-24} OUT=${2:-runs/bench_step_time}
VENV=${VENV:-$PWD/.venv}
VENV=$VENV bash recipes/setup_cpu.sh
# shellcheck disable=SC1091
source "$VENV/bin/activate"
python -m data_prep.testbed --out "$OUT/testbed" --seed 0
COMMON=(trainer.val_before_train=false trainer.test_freq=-1 trainer.save_freq=-1)
bash recipes/testbed_cpu.sh grpo "$OUT/testbed" "$OUT/grpo" "$STEPS" 0 "${COMMON[@]}"
bash recipes/testbed_cpu.sh prefix_rft "$OUT/testbed" "$OUT/prefix_rft" "$STEPS" 0 "${COMMON[@]}"
bash recipes/testbed_cpu.sh stock_grpo "$OUT/testbed" "$OUT/stock" "$STEPS" 0 "${COMMON[@]}"
python - "$OUT" <<'PY'
import statistics
import sys
from pathlib import Path

from verl_prefix import run_log

runs = {name: Path(sys.argv[1]) / name / "metrics.jsonl" for name in ("stock", "grpo", "prefix_rft")}
skip = 4  # the first steps warm caches up
step, gen, tokens = {}, {}, {}
for name, file in runs.items():
    step[name] = statistics.median([v for s, v in run_log.series(file, "timing_s/step") if s > skip])
    gen[name] = statistics.median([v for s, v in run_log.series(file, "timing_s/gen") if s > skip])
    tokens[name] = run_log.generated_tokens(file)
for name in runs:
    print(
        f"{name:<12} step x{step[name] / step['grpo']:.2f}  generation x{gen[name] / gen['grpo']:.2f}  "
        f"generated tokens x{tokens[name] / tokens['grpo']:.2f}   (+prefix=grpo is 1)"
    )
PY
