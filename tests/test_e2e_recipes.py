"""The recipes for 8 GPUs, the same files with the CPU overlay, for two steps through stock main_ppo.

One runs by default; `make e2e` runs them all.
"""

from __future__ import annotations

import pytest
from tests_support import compose_in_process

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def test_recipe_runs_with_the_cpu_overlay(e2e_recipe, run_recipe, tmp_path):
    # with the recipe's own grader, for which the testbed's digits are an answer like any other
    grader = "reward.custom_reward_function.path=pkg://verl_prefix.reward"
    run = run_recipe(tmp_path / e2e_recipe, e2e_recipe, 2, grader)
    preset = compose_in_process(f"+prefix={e2e_recipe}")
    assert f"preset {e2e_recipe} " in (run.folder / "console.log").read_text()
    for step in (1, 2):
        assert run.metrics[step]["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert run.metrics[step]["prefix/missing_rollouts"] == 0
        kept = [r for r in run.rollouts[step] if r["role"] != "padding"]
        assert len(kept) == 8 * preset.actor_rollout_ref.rollout.n
        for count in ("timeout", "crash"):
            assert run.metrics[step][f"reward/grader_{count}"] == 0
        # the base model writes a box most of the time, and not always
        assert 0 <= run.metrics[step]["reward/grader_no_answer"] < 0.5
        if preset.prefix.sampling.law == "whole":
            assert all(r["score"] == 1 for r in run.prefixed(step))
    assert any(name.startswith("val-core/") for name in run.metrics[2])
