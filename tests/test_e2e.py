"""Stock main_ppo on the CPU: real Ray, TransferQueue, FSDP2 on gloo and vLLM, through the project's own recipe.

The numbers asserted here come out wrong if a seam breaks: rollouts from a policy other than the trained one, prefixes
cut from text instead of ids, lost columns, prefixes in validation, other draws after a resume.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from tests_support import Run

from benchmarks.study.run import read_results
from verl_prefix import run_log
from verl_prefix.config import PrefixConfig
from verl_prefix.sampling import draw_prefix

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CORRELATION = "training/rollout_actor_probs_pearson_corr"


@pytest.fixture(scope="module")
def prefix_run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("prefix_rft"), "prefix_rft", 4)


@pytest.fixture(scope="module")
def rows(testbed):
    return {row["extra_info"]["index"]: row for row in pq.read_table(testbed / "train.parquet").to_pylist()}


@pytest.fixture(scope="module")
def tokenizer(testbed):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(testbed / "model")


def test_rollouts_come_from_the_policy_that_is_trained(prefix_run):
    for step in range(1, 5):
        assert prefix_run.metrics[step][CORRELATION] > 0.999
        assert prefix_run.metrics[step]["actor/ppo_kl"] == pytest.approx(0.0, abs=1e-5)


def test_one_rollout_of_each_group_with_a_demonstration_is_prefixed(prefix_run, rows):
    for step, rollouts in prefix_run.rollouts.items():
        assert len(rollouts) == 8 * 4
        demonstrated = {r["group"] for r in rollouts if rows[r["row_index"]]["demos"]}
        assert {r["group"] for r in prefix_run.prefixed(step)} == demonstrated
        assert [r["session"] for r in prefix_run.prefixed(step)] == [0] * len(demonstrated)
        share = prefix_run.metrics[step]["prefix/rollout_share"]
        assert share == pytest.approx(len(demonstrated) / 32)
    assert sum(len(prefix_run.prefixed(step)) for step in prefix_run.rollouts) > 8


def test_prefix_is_the_demonstrations_head_token_for_token(prefix_run, rows, tokenizer):
    config = PrefixConfig.of({"seed": 0, "schedule": {"steps": 100}})
    for step in prefix_run.rollouts:
        lengths = []
        for rollout in prefix_run.prefixed(step):
            demonstration = rows[rollout["row_index"]]["demos"][rollout["demo_index"]]
            ids = tokenizer.encode(demonstration, add_special_tokens=False)
            draw = draw_prefix(config, step=step, row_index=rollout["row_index"], session_id=0, demo_lens=[len(ids)])
            assert rollout["prefix_len"] == draw.prefix_len
            assert rollout["prefix_ids"] == ids[: draw.prefix_len]
            assert rollout["output"].startswith(demonstration[: rollout["prefix_chars"]])
            assert rollout["prefix_chars"] == draw.prefix_len  # one character a token here
            lengths.append(draw.prefix_len)
        assert prefix_run.metrics[step]["prefix/len/mean"] == pytest.approx(sum(lengths) / len(lengths))


def test_entropy_clip_and_reward_reach_the_advantages(prefix_run):
    for step in range(1, 5):
        metrics = prefix_run.metrics[step]
        assert metrics["prefix/entropy_clip_kept"] == pytest.approx(0.2, abs=0.02)
        assert metrics["prefix/updated_share"] <= metrics["prefix/entropy_clip_kept"]
        # 24 of 26 tokens are given at this point of the schedule: the policy copies the rest of the answer
        assert metrics["prefixed/reward"] > 0.5
    assert prefix_run.metrics[1]["on_policy/reward"] < 0.5


def test_the_rollout_log_has_the_advantages_of_each_token(prefix_run):
    for step, rollouts in prefix_run.rollouts.items():
        scores, updated = {}, 0
        for rollout in rollouts:
            scores.setdefault(rollout["group"], []).append(rollout["score"])
        for rollout in rollouts:
            advantage = rollout["score"] - sum(scores[rollout["group"]]) / 4
            if rollout["output"]:  # else an EOS at once
                assert rollout["advantages"][-1] == [len(rollout["output"]), pytest.approx(advantage, abs=1e-4)]
            begin = 0
            for end, value in rollout["advantages"]:
                assert value == pytest.approx(0 if value == 0 else advantage, abs=1e-4)
                updated += (min(end, rollout["prefix_chars"]) - min(begin, rollout["prefix_chars"])) * (value != 0)
                begin = end
        given = sum(rollout["prefix_chars"] for rollout in rollouts)
        own = sum(len(r["output"]) + (not r["hit_limit"]) for r in rollouts) - given  # a token a character, and the EOS
        assert prefix_run.metrics[step]["prefix/generated_tokens"] == own
        assert updated / given == pytest.approx(prefix_run.metrics[step]["prefix/updated_share"])


def test_no_prefix_in_validation(prefix_run):
    # With a prefix of 95 % the hard problems would be solved, as the training rollouts of the same step are.
    assert prefix_run.metrics[0]["val-core/chain_hard/acc/mean@1"] == pytest.approx(0.0, abs=0.02)
    assert prefix_run.metrics[4]["val-core/chain_hard/acc/mean@1"] < 0.1
    assert 0.1 < prefix_run.metrics[0]["val-core/chain_easy/acc/mean@1"] < 0.4


def test_start_of_the_run_is_announced_in_one_line(prefix_run):
    lines = (prefix_run.folder / "console.log").read_text().splitlines()
    banner = [line for line in lines if line.startswith("[verl_prefix 0")]
    assert len(banner) == 1
    for part in ("preset prefix_rft", "verl 0.9.1", "trainer prefix_sync", "device cpu"):
        assert part in banner[0]
    assert sum(line.startswith("[verl_prefix] no accelerator") for line in lines) == 1


def drawn(run, step):
    return sorted((r["row_index"], r["demo_index"], r["prefix_len"], r["prefix_ids"]) for r in run.prefixed(step))


def test_resumed_run_draws_the_same_prefixes(prefix_run, train, tmp_path):
    folder = tmp_path / "resumed"
    train(folder, "prefix_rft", 2, "trainer.resume_mode=auto", "trainer.val_before_train=false")
    shutil.rmtree(folder / "rollouts")
    resumed = train(folder, "prefix_rft", 4, "trainer.resume_mode=auto", "trainer.val_before_train=false")

    assert set(resumed.rollouts) == {3, 4}
    logged = dict(run_log.steps(folder / "metrics.jsonl"))
    assert set(logged) == {1, 2, 3, 4}, "the first segment's metrics are still there"
    for step in (3, 4):
        assert drawn(resumed, step) == drawn(prefix_run, step)
        assert {r["row_index"] for r in resumed.rollouts[step]} == {r["row_index"] for r in prefix_run.rollouts[step]}


def test_asynchronous_trainer_keys_a_prefix_by_the_step_its_prompt_was_issued_at(train, rows, tokenizer, tmp_path):
    """Also over a resume: what was in flight at the checkpoint is issued again."""
    mode = ("trainer.v1.trainer_mode=prefix_colocate_async", "prefix.schedule.steps=8", "trainer.resume_mode=auto")
    train(tmp_path / "async", "prefix_rft", 4, *mode)
    run = train(tmp_path / "async", "prefix_rft", 6, *mode, "trainer.val_before_train=false")
    config = PrefixConfig.of({"seed": 0, "schedule": {"steps": 8}})
    trained_on = [r["row_index"] for rollouts in run.rollouts.values() for r in rollouts if r["session"] == 0]
    assert len(set(trained_on)) == len(trained_on) == 6 * 8, "a row is trained on once an epoch"
    assert len(list((tmp_path / "async").glob("metrics.part*.jsonl"))) == 1
    behind, logged = 0, dict(run_log.steps(tmp_path / "async/metrics.jsonl"))
    for step in range(1, 7):
        metrics = logged[step]
        # a batch may be one policy behind; more would be another policy's
        assert metrics[CORRELATION] > (0.95 if metrics["training/off_policy/trajectory_staleness/max"] else 0.999)
        assert metrics["training/off_policy/trajectory_staleness/max"] <= 1
        assert len(run.rollouts[step]) == 8 * 4
        demonstrated = {r["group"] for r in run.rollouts[step] if rows[r["row_index"]]["demos"]}
        assert {r["group"] for r in run.prefixed(step)} == demonstrated
        for rollout in run.prefixed(step):
            ids = tokenizer.encode(rows[rollout["row_index"]]["demos"][rollout["demo_index"]], add_special_tokens=False)
            drawn = {
                issued: draw_prefix(
                    config, step=issued, row_index=rollout["row_index"], session_id=0, demo_lens=[len(ids)]
                ).ratio
                for issued in {max(step - 1, 1), step}
            }
            (issued,) = [issued for issued, ratio in drawn.items() if ratio == pytest.approx(rollout["prefix_ratio"])]
            behind += issued < step
            assert rollout["prefix_ids"] == ids[: rollout["prefix_len"]]
    assert behind > 0, "one batch is issued ahead, so some prompts are trained on a step after they were issued"
    assert logged[4]["val-core/chain_hard/acc/mean@1"] < 0.1


def test_two_workers_and_two_rollout_replicas_draw_as_one(prefix_run, train, tmp_path):
    two = "trainer.n_gpus_per_node=2"
    run = train(tmp_path / "two", "prefix_rft", 2, two, "trainer.val_before_train=false", "trainer.test_freq=-1")
    workers = set(re.findall(r"WorkerDict pid=(\d+)", (run.folder / "console.log").read_text()))
    assert len(workers) == 2
    for step in (1, 2):
        assert run.metrics[step][CORRELATION] > 0.999
        assert run.metrics[step]["actor/ppo_kl"] == pytest.approx(0.0, abs=1e-5)
        assert run.metrics[step]["actor/grad_norm"] > 0
        assert drawn(run, step) == drawn(prefix_run, step)
        # R - mean over the whole group, whichever replica a rollout is from and whichever worker trains on it
        scores = {}
        for rollout in run.rollouts[step]:
            scores.setdefault(rollout["group"], []).append(rollout["score"])
        for role in ("prefixed", "on_policy"):
            chosen = [r for r in run.rollouts[step] if r["role"] == role]
            own = [len(r["output"]) + (not r["hit_limit"]) - r["prefix_len"] for r in chosen]  # a token a character
            baseline = [sum(scores[r["group"]]) / len(scores[r["group"]]) for r in chosen]
            total = sum(n * (r["score"] - b) for n, r, b in zip(own, chosen, baseline, strict=True))
            assert run.metrics[step][f"{role}/advantage"] == pytest.approx(total / sum(own), abs=1e-4)


@pytest.fixture(scope="module")
def compare(testbed, root, tmp_path_factory):
    """The comparison of two methods, shortened: recipes/compare_cpu.sh, called as in the README. A second call runs
    nothing again."""
    out = tmp_path_factory.mktemp("study")
    (out / "testbed_seed0").symlink_to(testbed)
    command = ["bash", "recipes/compare_cpu.sh", "grpo sft", "0", "--steps", "16", "--out", out]
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "VENV": sys.prefix}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
        outputs.append(done.stdout)
    assert outputs[1].count("done") == 2
    return out


def test_the_comparison_leaves_one_result_a_run(compare):
    grpo, sft = read_results(compare / "results")
    assert (grpo["method"], sft["method"]) == ("grpo", "sft")
    assert [point["updates"] for point in grpo["curve"]] == [0, 8, 16]
    assert [point["updates"] for point in sft["curve"]] == [0, 8, 16]
    # 16 steps x 16 prompts x 8 rollouts of at most 32 tokens; SFT generates none
    assert 16 * 128 * 20 < grpo["curve"][-1]["tokens"] < 16 * 128 * 32
    assert sft["curve"][-1]["tokens"] == 0
    # SFT starts from demonstrations of hard problems, GRPO from what the policy can do by itself
    assert sft["curve"][-1]["easy"] > sft["curve"][0]["easy"] + 0.15
    assert all(point["seconds"] > 0 for result in (grpo, sft) for point in result["curve"][1:])


def test_the_control_has_no_prefixes(compare):
    """verl's own estimator through the same seam, on a training file that has demonstrations."""
    folder = compare / "runs/grpo_seed0/rl"
    run = Run(folder, (folder / "console.log").read_text())
    # it learns what the policy can reach
    easy = "val-core/chain_easy/acc/mean@1"
    assert run.metrics[16][easy] > run.metrics[0][easy] + 0.15
    for step in range(1, 17):
        assert run.metrics[step][CORRELATION] > 0.999
        assert run.metrics[step]["prefix/rollout_share"] == 0
        assert run.prefixed(step) == []
        assert "prefixed/reward" not in run.metrics[step]
        # GRPO divides by the group's standard deviation: with k of 8 right, (1 - k/8) / sqrt(k (8 - k) / 56)
        best = [(1 - k / 8) / math.sqrt(k * (8 - k) / 56) for k in range(1, 8)]
        assert run.metrics[step]["critic/advantages/max"] in (0.0, *(pytest.approx(x, abs=1e-3) for x in best))
