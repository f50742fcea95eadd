"""Metrics on a batch small enough to work out by hand, names that survive verl's aggregation, and the warning."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_prefix.metrics import (
    CORRELATION,
    DESCRIPTIONS,
    DIFFERENCE,
    CorrelationWatch,
    clip_fractions,
    grader_metrics,
    prefix_metrics,
)


@pytest.fixture
def batch():
    # rows: group a with prefix 2, a without, b without, and one synthetic padding row
    return {
        "reward": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "advantages": torch.tensor([[0.5, 0.0, 0.5, 0.5], [-0.5, -0.5, 0, 0], [0, 0, 0, 0], [9, 9, 9, 9]]),
        "entropy": torch.tensor([[1.0, 3.0, 2.0, 4.0], [1, 2, 0, 0], [5, 0, 0, 0], [7, 7, 7, 7]]),
        "response_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        "response_len": torch.tensor([4, 2, 1, 1]),
        "group": np.array(["a", "a", "b", "pad"], dtype=object),
        "rows": {
            "real": torch.tensor([True, True, True, False]),
            "prefix_len": torch.tensor([2, 0, 0, 0]),
            "low": torch.tensor([0.4, float("nan"), float("nan"), float("nan")]),
            "high": torch.tensor([0.9, float("nan"), float("nan"), float("nan")]),
            "ratio": torch.tensor([0.5, 0.0, 0.0, 0.0]),
            "demo_len": torch.tensor([4, 0, 0, 0]),
            "hit_limit": torch.tensor([True, False, False, False]),
            "no_demonstration": torch.tensor([False, True, True, True]),
            "clip_kept": torch.tensor([True, False]),
        },
        "expected_groups": 3,
        "rollouts_per_group": 2,
    }


def test_values(batch):
    got = prefix_metrics(**batch)
    expected = {
        "prefix/rollout_share": 1 / 3,
        "prefix/token_share": 2 / 7,
        "prefix/generated_tokens": 5,
        "prefix/low": 0.4,
        "prefix/high": 0.9,
        "prefix/ratio/mean": 0.5,
        "prefix/len/mean": 2,
        "prefix/len/max": 2,
        "prefix/len/min": 2,
        "prefix/prefix_advantage": 0.25,
        "prefix/prefix_entropy": 2.0,
        "prefix/entropy_clip_kept": 0.5,
        "prefix/updated_share": 0.5,
        "prefix/groups_without_signal": 0.5,
        "prefix/evicted_groups": 1,
        "prefix/missing_rollouts": 3,
        "prefix/no_demonstration": 2,
        "prefixed/reward": 1.0,
        "prefixed/advantage": 0.5,
        "prefixed/entropy": 3.0,
        "prefixed/response_len": 4,
        "prefixed/truncated": 1.0,
        "on_policy/reward": 0.5,
        "on_policy/advantage": -1 / 3,
        "on_policy/entropy": 8 / 3,
        "on_policy/response_len": 1.5,
        "on_policy/truncated": 0.0,
    }
    assert got == pytest.approx(expected, rel=1e-6)
    clip = {"prefix/clipfrac", "prefixed/clipfrac", "on_policy/clipfrac"}
    gates = {"gate/failing_share", "gate/dropped_rollouts", "gate/dropped_tokens"}
    faults = {"prefix/rollout_log_lost", "prefix/metrics_log_lost", "actor/update_skipped"}
    terms = gates | faults | {"sft/weight", "actor/sft_loss"}  # made by trainer and loss
    assert set(expected) | clip | terms == set(DESCRIPTIONS), (
        "every metric is documented and every documented one is made"
    )


def test_clip_fractions_are_counts_over_counts():
    step = {"actor/lr": 1.0}
    step |= {"actor/prefix/prefix_tokens": 8, "actor/prefix/prefix_clipped": 2}
    step |= {"actor/prefix/prefixed_tokens": 0, "actor/prefix/prefixed_clipped": 0}
    step |= {"actor/prefix/on_policy_tokens": 10, "actor/prefix/on_policy_clipped": 1}
    assert clip_fractions(step) == {"prefix/clipfrac": 0.25, "on_policy/clipfrac": 0.1}
    assert step == {"actor/lr": 1.0}


def test_what_the_grader_reports_is_averaged_over_real_rows():
    info = [{"grader_timeout": 1.0, "acc": 1.0}, {"grader_timeout": 0.0, "acc": 0.0}, {"grader_timeout": 1.0}, {}]
    assert grader_metrics(info, [True, True, False, True]) == {"reward/grader_timeout": 0.5}
    assert grader_metrics([{}, {"acc": 1.0}], [True, True]) == {}


def test_the_page_says_what_the_code_says():
    page = (Path(__file__).resolve().parents[1] / "docs/metrics.md").read_text()
    table = dict(re.findall(r"^\| `([^`]+/[^`]+)` \| (.+) \|$", page, re.M))
    assert table == DESCRIPTIONS


def test_a_batch_without_prefixes_leaves_their_measures_out(batch):
    batch["rows"]["prefix_len"] = torch.zeros(4, dtype=torch.long)
    batch["rows"]["clip_kept"] = torch.zeros(0, dtype=torch.bool)
    got = prefix_metrics(**batch)
    assert got["prefix/rollout_share"] == 0
    assert got["prefix/token_share"] == 0
    assert not [name for name in got if name.startswith(("prefixed/", "prefix/len"))]
    assert all(np.isfinite(value) for value in got.values())


def test_what_the_gate_dropped_is_not_missing(batch):
    assert prefix_metrics(**batch, dropped_rollouts=2)["prefix/missing_rollouts"] == 1


def test_a_frozen_prefix_is_still_counted_as_prefix(batch):
    batch["response_mask"][0, :2] = 0
    got = prefix_metrics(**batch)
    assert got["prefix/token_share"] == pytest.approx(2 / 7)
    assert got["prefixed/advantage"] == pytest.approx(0.5)


def test_names_are_aggregated_as_they_mean():
    from verl.trainer.ppo.v1.utils import MetricsAggregator

    aggregator = MetricsAggregator()
    for name in DESCRIPTIONS:
        meant = {"max": "max", "min": "min"}.get(name.rsplit("/", 1)[-1], "weighted_avg")
        assert aggregator._get_aggregation_type(name) == meant, name


def test_names_survive_the_drivers_reduction():
    from verl.utils.metric import reduce_metrics

    for name in DESCRIPTIONS:
        reduced = reduce_metrics({name: [1.0, 3.0]})[name]
        assert reduced == {"max": 3.0, "min": 1.0}.get(name.rsplit("/", 1)[-1], 2.0), name


def test_low_correlation_warns_once_in_a_while():
    watch = CorrelationWatch(0.9, repeat_every=10)
    assert not watch.check({CORRELATION: 0.95}, 1)
    assert not watch.check({}, 1)
    with pytest.warns(RuntimeWarning, match=r"step 2: .* correlate at 0.100.*weight synchronisation"):
        assert watch.check({CORRELATION: 0.1}, 2)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.check({CORRELATION: 0.1}, 5)
    with pytest.warns(RuntimeWarning, match="step 12"):
        watch.check({CORRELATION: 0.1}, 12)


def test_undefined_correlation_warns_only_if_the_two_differ():
    nan = float("nan")
    assert not CorrelationWatch(0.9).check({CORRELATION: nan, DIFFERENCE: 1e-6}, 1)
    with pytest.warns(RuntimeWarning, match="correlate at nan"):
        assert CorrelationWatch(0.9).check({CORRELATION: nan, DIFFERENCE: 0.4}, 1)
