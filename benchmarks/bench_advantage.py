"""Time and memory of an advantage estimator with its entropy clip, against a per-row Python loop in the same run.

    python benchmarks/bench_advantage.py                    # 1024 x 8192, 1 row in 8 prefixed
    python benchmarks/bench_advantage.py --every 1 --json   # all rows prefixed: the most the clip ever has to do

Two loops stand for comparison. `row loop`: one pass over the rows with a few tensor operations each, one sort of all
prefix tokens. `token loop`: the same with Python numbers, a pass over the tokens of every row; it is measured on the
first `--token-rows` rows and scaled by the number of rows. Both give what the vectorised code gives; this is checked.

Peak extra memory is that of the resident set, in a process of its own: the kernel's high-water mark (VmHWM) is reset
through /proc/self/clear_refs right before the call and read right after it, so inputs and imports do not count and the
returned advantages do. It covers what NumPy allocates as well, which torch's profiler does not see. A call at 8 x 64
before it loads lazily loaded code. Linux only; elsewhere the memory is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from verl_prefix.advantage import ESTIMATORS
from verl_prefix.config import PrefixConfig

GROUP = 8  # rollouts per prompt


def make_batch(rows: int, tokens: int, every: int, seed: int) -> dict:
    """Rewards of 0 or 1 on the last token, responses of a random length, each `every`-th row with a random prefix."""
    rng = torch.Generator().manual_seed(seed)
    length_B = torch.randint(2, tokens + 1, (rows,), generator=rng)
    prefix_len = (torch.rand(rows, generator=rng) * (length_B - 1)).long().clamp(min=1)
    prefix_len[torch.arange(rows) % every != 0] = 0
    rewards_BT = torch.zeros(rows, tokens)
    rewards_BT[torch.arange(rows), length_B - 1] = (torch.rand(rows, generator=rng) > 0.5).float()
    return {
        "token_level_rewards": rewards_BT,
        "response_mask": (torch.arange(tokens) < length_B[:, None]).long(),
        "index": np.array([f"prompt-{row // GROUP}" for row in range(rows)], dtype=object),
        "prefix_len": prefix_len,
        "entropy": torch.rand(rows, tokens, generator=rng),
    }


def row_loop(batch: dict, share: float) -> torch.Tensor:
    """`prefix_rft` with the batch-wide top-entropy clip, a row at a time."""
    rewards_BT, mask_BT, index = batch["token_level_rewards"], batch["response_mask"], batch["index"]
    scores, members = [], {}
    for row in range(len(index)):
        scores.append(rewards_BT[row].sum().item())
        members.setdefault(index[row], []).append(row)
    advantages_BT = torch.zeros_like(rewards_BT)
    for rows in members.values():
        mean = sum(scores[row] for row in rows) / len(rows)
        for row in rows:
            advantages_BT[row] = (scores[row] - mean) * mask_BT[row]
    pool, prefixes = [], {}
    for row in range(len(index)):
        length = int(batch["prefix_len"][row])
        if length > 0:
            prefixes[row] = torch.arange(mask_BT.shape[1])[:length][mask_BT[row, :length] > 0]
            pool.append(batch["entropy"][row][prefixes[row]])
    if not pool:
        return advantages_BT
    ranked = torch.cat(pool).sort(descending=True).values
    threshold = ranked[math.ceil(share * len(ranked) - 1e-9) - 1]
    for row, positions in prefixes.items():
        advantages_BT[row, positions[batch["entropy"][row, positions] < threshold]] = 0
    return advantages_BT


def token_loop(batch: dict, share: float) -> list[list[float]]:
    """The same, a token at a time."""
    rewards, mask, entropy = (batch[key].tolist() for key in ("token_level_rewards", "response_mask", "entropy"))
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(batch["index"]):
        members.setdefault(prompt, []).append(row)
    advantages = [[0.0] * len(row) for row in mask]
    for rows in members.values():
        score = {row: sum(rewards[row]) for row in rows}
        mean = sum(score.values()) / len(rows)
        for row in rows:
            for t, inside in enumerate(mask[row]):
                if inside:
                    advantages[row][t] = score[row] - mean
    prefix = [
        (row, t) for row, length in enumerate(batch["prefix_len"].tolist()) for t in range(length) if mask[row][t]
    ]
    prefix.sort(key=lambda at: -entropy[at[0]][at[1]])
    for row, t in prefix[math.ceil(share * len(prefix) - 1e-9) :]:
        advantages[row][t] = 0.0
    return advantages


def best_time(call, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def high_water_mark() -> int:
    """Bytes of the largest resident set since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def peak_extra_bytes(options: argparse.Namespace) -> int:
    """Growth of the resident set during one call. Only meaningful in a fresh process."""
    estimator, config = ESTIMATORS[options.estimator], make_config(options)
    estimator(**make_batch(8, 64, 1, 0), config=config)
    batch = make_batch(options.rows, options.tokens, options.every, options.seed)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mark()
    advantages, _ = estimator(**batch, config=config)
    return high_water_mark() - before


def measure_memory(options: argparse.Namespace) -> float | None:
    """Peak extra memory in units of one (B, T) float32; None where the kernel does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    # Freed blocks go back to the kernel at once, so memory that the set-up left over cannot hide a new allocation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-child"]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        print(f"memory not measured: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return int(child.stdout) / (4 * options.rows * options.tokens)


def make_config(options: argparse.Namespace) -> PrefixConfig:
    return PrefixConfig.of(
        {"entropy_clip": {"keep": options.keep, "pool": options.pool, "share": options.share}, "seed": options.seed}
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time and memory of the estimators.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="B, rollouts in the batch")
    parser.add_argument("--tokens", type=int, default=8192, help="T, response positions")
    parser.add_argument("--every", type=int, default=8, help="one prefixed row in so many")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="prefix_rft", help="estimator to measure")
    parser.add_argument("--keep", choices=("top", "bottom", "random", "all"), default="top", help="entropy_clip.keep")
    parser.add_argument("--pool", choices=("batch", "sequence"), default="batch", help="entropy_clip.pool")
    parser.add_argument("--share", type=float, default=0.2, help="entropy_clip.share")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the fastest counts")
    parser.add_argument("--token-rows", type=int, default=64, help="rows on which the token loop is measured")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_child:
        print(peak_extra_bytes(options))
        return

    estimator, config = ESTIMATORS[options.estimator], make_config(options)
    batch = make_batch(options.rows, options.tokens, options.every, options.seed)
    seconds = best_time(lambda: estimator(**batch, config=config), options.repeats)
    result = {
        "rows": options.rows,
        "tokens": options.tokens,
        "prefixed_rows": int((batch["prefix_len"] > 0).sum()),
        "prefix_tokens": int(batch["prefix_len"].sum()),
        "estimator": options.estimator,
        "clip": f"{options.keep}/{options.pool}/{options.share}",
        "threads": torch.get_num_threads(),
        "vectorised_s": seconds,
        "peak_extra_BT_float32": measure_memory(options),
    }
    if (options.estimator, options.keep, options.pool) == ("prefix_rft", "top", "batch"):  # what the loops compute
        looped = row_loop(batch, options.share)
        torch.testing.assert_close(estimator(**batch, config=config)[0], looped, rtol=1e-5, atol=1e-6)
        result["row_loop_s"] = best_time(lambda: row_loop(batch, options.share), 1)
        result["row_loop_ratio"] = result["row_loop_s"] / seconds

        rows = min(options.token_rows, options.rows)
        part = make_batch(rows, options.tokens, options.every, options.seed)
        start = time.perf_counter()
        listed = token_loop(part, options.share)
        result["token_loop_s"] = (time.perf_counter() - start) * options.rows / rows
        result["token_loop_ratio"] = result["token_loop_s"] / seconds
        torch.testing.assert_close(estimator(**part, config=config)[0], torch.tensor(listed), rtol=1e-5, atol=1e-6)

    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")


if __name__ == "__main__":
    main()
