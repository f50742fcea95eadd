"""Made-up run folders with the files of a real one, for the tests of `compare` and `report`."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import yaml


def metrics(step: int, last: int, seed: int, best: float, prefixes: bool) -> dict[str, float]:
    """Metrics of a training step as verl and the plugin log them, noisy and rising to `best`."""
    noise = random.Random(f"{seed}/{step}").gauss(0, 0.03)
    done = step / last
    values = {
        "actor/grad_norm": 1.0,
        "actor/entropy": 0.6 - 0.3 * done + noise,
        "actor/pg_clipfrac": 0.01 + abs(noise) / 10,
        "critic/score/mean": best * done + noise,
        "response_length/mean": 25.0,
        "prompt_length/mean": 8.0,
        "perf/total_num_tokens": 33.0 * 128,
        "timing_s/step": 3.6,
    }
    if prefixes:
        low = 0.95 * (1 + math.cos(math.pi * done)) / 2
        values |= {
            "prefix/rollout_share": 0.125,
            "prefix/token_share": 0.1,
            "prefix/generated_tokens": 128 * 25.0 * 0.9,
            "prefix/low": low,
            "prefix/high": 0.95,
            "prefix/ratio/mean": (low + 0.95) / 2 + noise / 3,
            "prefix/prefix_entropy": 0.5 - 0.2 * done,
            "prefix/entropy_clip_kept": 0.2 + noise / 5,
            "prefix/clipfrac": abs(noise) / 3,
            "prefix/groups_without_signal": 0.5 - 0.4 * done + noise,
        }
        for side, more in (("prefixed", 0.1), ("on_policy", 0.0)):
            values |= {
                f"{side}/reward": min(1.0, best * done + more) + noise,
                f"{side}/entropy": 0.6 - 0.3 * done + noise,
                f"{side}/response_len": 25 + 30 * noise,
                f"{side}/clipfrac": abs(noise) / 5,
            }
    return values


def rollout(step: int, number: int, session: int, output: str | None = None, **changes: Any) -> dict[str, Any]:
    """One line of the rollout log; of each group the first rollout has a prefix of 8 characters."""
    text = f"a4g8bAh8c0i0\\boxed{{48A80{session}}}" if output is None else output
    prefix = 0 if session else min(8, len(text))
    return {
        "input": f"{number}agbhci=",
        "output": text,
        "gts": "48A800",
        "score": float(session % 2),
        "step": step,
        "uid": f"g{number}_{session}_0",
        "group": f"g{number}",
        "session": session,
        "row_index": number,
        "role": "prefixed" if prefix else "on_policy",
        "prefix_len": prefix,
        "prefix_chars": prefix,
        "prefix_ids": [7] * prefix,
        "demo_index": 0 if prefix else -1,
        "demo_len": 20 if prefix else 0,
        "prefix_ratio": 0.4 if prefix else 0.0,
        "hit_limit": False,
        "trained": True,
        "advantages": [[end, value] for end, value in ((3 if prefix > 3 else 0, 0.0), (len(text), 0.75)) if end]
        if prefix
        else [[len(text), -0.25]] * bool(text),
    } | changes


def write_rollouts(folder: Path, step: int, rollouts: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))


def write_run(
    folder: Path,
    *,
    steps: int = 20,
    seed: int = 0,
    best: float = 0.8,
    every: int = 5,
    groups: int = 2,
    size: int = 4,
    prefixes: bool = True,
    logged: int | None = None,
    config: dict[str, Any] | None = None,
    output: str | None = None,
) -> Path:
    """A run folder. Accuracy of `hard` rises in a straight line from 0 to `best`, that of `easy` is 0.9.

    `logged` steps have a rollout log, all by default; beyond the first they are hard links, so that a log of 1,000
    steps takes the space of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(steps + 1):
            values = metrics(step, steps, seed, best, prefixes) if step else {}
            if step % every == 0:
                values |= {"val-core/easy/acc/mean@1": 0.9, "val-core/hard/acc/mean@1": best * step / steps}
            stream.write(json.dumps({"step": step, "data": values}) + "\n")
    logged = steps if logged is None else logged
    if logged:
        lines = [rollout(1, g, s, output) for g in range(groups) for s in range(size)]
        write_rollouts(folder / "rollouts", 1, lines)
        for step in range(2, logged + 1):
            os.link(folder / "rollouts" / "1.jsonl", folder / "rollouts" / f"{step}.jsonl")
    if config is None:
        config = {
            "data": {"train_batch_size": 32, "seed": seed},
            "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 16, "ppo_epochs": 1}},
            "trainer": {"default_local_dir": f"{folder}/checkpoints"},
        }
    hydra = folder / "hydra" / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
