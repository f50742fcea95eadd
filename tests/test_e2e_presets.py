"""Every preset through stock main_ppo on the CPU for two steps: what it promises is in the metrics and the rollouts.

Four run by default; `make e2e` runs them all and prints a table.
"""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
from tests_support import compose_in_process

from verl_prefix.adaptive import FILE_NAME, next_interval
from verl_prefix.config import PrefixConfig
from verl_prefix.sampling import has_prefixes, keeps_demonstrations

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CORRELATION = "training/rollout_actor_probs_pearson_corr"


def test_preset(e2e_preset, train, testbed, tmp_path, preset_table):
    run = train(tmp_path / e2e_preset, e2e_preset, 2, "trainer.val_before_train=false", "trainer.test_freq=-1")
    composed = compose_in_process(f"+prefix={e2e_preset}", "actor_rollout_ref.rollout.n=4")
    config = PrefixConfig.of(composed.prefix)
    table = pq.read_table(testbed / "train.parquet").to_pylist()
    has_demonstration = {row["extra_info"]["index"]: bool(row["demos"]) for row in table}
    for step in (1, 2):
        metrics, rollouts = run.metrics[step], run.rollouts[step]
        assert metrics[CORRELATION] > 0.999
        assert metrics["actor/ppo_kl"] == pytest.approx(0.0, abs=1e-4)
        assert metrics["prefix/missing_rollouts"] == 0
        assert math.isfinite(metrics["actor/pg_loss"])
        assert math.isfinite(metrics["actor/grad_norm"])
        # With few prompts every group may be all right or all wrong; a method without another term then stands still.
        has_signal = metrics["prefix/groups_without_signal"] < 1
        other_terms = composed.actor_rollout_ref.actor.entropy_coeff > 0 or "actor/sft_loss" in metrics
        if has_signal or other_terms:
            assert metrics["actor/grad_norm"] > 0
        assert len([r for r in rollouts if r["role"] != "padding"]) == 8 * 4, "dropped rollouts are logged as well"
        prefixed = run.prefixed(step)
        shown = [r for r in rollouts if r["role"] != "padding" and keeps_demonstrations(config, r["row_index"])]
        shown = [r for r in shown if has_demonstration[r["row_index"]] and r["session"] < config.sampling.rollouts]
        if not has_prefixes(config, step):
            shown = []
        assert prefixed or not shown
        assert {(r["group"], r["session"]) for r in prefixed} <= {(r["group"], r["session"]) for r in shown}
        assert all(r["session"] < config.sampling.rollouts for r in prefixed)
        if config.sampling.law == "whole":
            assert all(r["prefix_len"] == r["demo_len"] + 1 and r["score"] == 1 for r in prefixed)
        if config.sampling.shared:
            for group in {r["group"] for r in prefixed}:
                assert len({tuple(r["prefix_ids"]) for r in prefixed if r["group"] == group}) == 1
        assert ("actor/sft_loss" in metrics) == (max(config.sft.weight.initial, config.sft.weight.target) > 0)
        if config.gate.max_correct is not None:
            check_gate(rollouts, metrics)
        else:
            assert all(r["trained"] for r in rollouts if r["role"] != "padding")
    preset_table.append(
        (
            e2e_preset,
            len(run.prefixed(2)),
            *(
                format(run.metrics[2][name], ".4f") if name in run.metrics[2] else "-"
                for name in ("actor/pg_loss", "actor/sft_loss", "gate/dropped_rollouts", CORRELATION)
            ),
        )
    )


def check_gate(rollouts, metrics):
    """HPT's and SuperRL's rule, from the log: a prompt trains on its demonstration or on its own rollouts."""
    failing = 0
    groups = {r["group"] for r in rollouts if r["role"] != "padding"}
    for group in groups:
        own = [r for r in rollouts if r["group"] == group and r["role"] == "on_policy"]
        shown = [r for r in rollouts if r["group"] == group and r["role"] == "prefixed"]
        fails = not any(r["score"] > 0 for r in own)
        failing += fails
        assert all(r["trained"] == fails for r in shown)
        assert all(r["trained"] == (not fails or not shown) for r in own)
    assert metrics["gate/failing_share"] == pytest.approx(failing / len(groups))
    dropped = [r for r in rollouts if r["role"] != "padding" and not r["trained"]]
    assert metrics["gate/dropped_rollouts"] == len(dropped)
    lengths = [len(r["output"]) for r in dropped if r["role"] == "on_policy"]  # one token a character, then the EOS
    assert sum(lengths) <= metrics["gate/dropped_tokens"] <= sum(lengths) + len(lengths)


def test_adaptive_intervals_follow_rewards_and_survive_a_resume(train, tmp_path):
    folder, few = tmp_path / "adaptive", ("trainer.val_before_train=false", "trainer.test_freq=-1")
    # 16 rows, so that step 3 meets rows of step 1 again
    few += ("data.train_max_samples=16", "data.shuffle=false", "trainer.save_freq=1")
    first = train(folder, "adaptive", 2, *few)
    saved = {row: (low, high) for row, low, high in state(folder, 2)}
    expected = {}
    for step in (1, 2):
        for group in {r["group"] for r in first.prefixed(step)}:
            rollouts = [r for r in first.rollouts[step] if r["group"] == group]
            reward = sum(r["score"] for r in rollouts) / len(rollouts)
            expected[rollouts[0]["row_index"]] = next_interval(rollouts[0]["prefix_ratio"], reward, 0.5)
    assert saved.keys() == expected.keys()
    assert saved
    for row, interval in saved.items():
        assert interval == pytest.approx(expected[row])
    resumed = train(folder, "adaptive", 3, *few, "trainer.resume_mode=auto")
    again = [r for r in resumed.rollouts[3] if r["row_index"] in saved]
    assert again
    for rollout in again:
        low, high = saved[rollout["row_index"]]
        if rollout["role"] == "prefixed":  # an interval that ends under a token gives a plain rollout
            assert low <= rollout["prefix_ratio"] <= high


def state(folder, step):
    return json.loads((folder / f"checkpoints/global_step_{step}" / FILE_NAME).read_text())
