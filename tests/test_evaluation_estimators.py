"""pass@k, avg@k and their intervals against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_prefix.evaluation import estimators, summary

counts = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * c + [0] * (n - c)
        subsets = list(itertools.combinations(range(n), k))
        share = sum(any(samples[i] for i in subset) for subset in subsets) / len(subsets)
        assert estimators.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@given(counts)
def test_pass_at_k_bounds_and_order(given_counts):
    n, c, k = given_counts
    value = estimators.pass_at_k(n, c, k)
    assert 0 <= value <= 1
    assert (value == 0) == (c == 0)
    assert (value == 1) == (n - c < k)
    assert estimators.pass_at_k(n, c, 1) == pytest.approx(c / n)
    if k > 1:
        assert value >= estimators.pass_at_k(n, c, k - 1)
    if c:
        assert value > estimators.pass_at_k(n, c - 1, k) or n - c + 1 < k


@given(st.integers(1, 20), st.floats(0, 1), st.data())
def test_pass_at_k_is_unbiased(n, p, data):
    k = data.draw(st.integers(1, n))
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimators.pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=rf"pass@{k} with {c} of {n}"):
        estimators.pass_at_k(n, c, k)


def test_many_samples_do_not_overflow():
    assert estimators.pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_ks_are_powers_of_two_and_n():
    assert [estimators.ks(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_bootstrap_is_the_mean_over_drawn_problems():
    values = np.array([[0.0, 0.25], [1.0, 1.0], [0.5, 0.75]])
    draws = np.random.default_rng(7).integers(3, size=(50, 3))
    by_hand = [[sum(values[i, column] for i in draw) / 3 for column in range(2)] for draw in draws]
    np.testing.assert_allclose(estimators.bootstrap(values, seed=7, resamples=50), by_hand)


def test_bootstrap_in_blocks_uses_every_draw(monkeypatch):
    values = np.arange(12.0).reshape(6, 2)
    whole = estimators.bootstrap(values, resamples=400)
    monkeypatch.setattr(estimators, "_CELLS", 36)  # 3 resamples a block
    blocks = estimators.bootstrap(values, resamples=400)
    assert blocks.shape == whole.shape
    assert len(np.unique(blocks[:, 0])) > 20  # later blocks are not copies of the first
    np.testing.assert_allclose(blocks.mean(axis=0), whole.mean(axis=0), atol=0.35)
    np.testing.assert_allclose(blocks.std(axis=0), whole.std(axis=0), rtol=0.15)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):  # 60 problems of differing difficulty, 4 samples each; their mean chance is 0.5
        outcomes = generator.random((60, 4)) < generator.beta(1, 1, size=(60, 1))
        avg = estimators.of_set(outcomes.tolist(), seed=1)[0]["avg"]
        covered += avg["low"] <= 0.5 <= avg["high"]
    assert 0.91 <= covered / 300 <= 0.98


def test_a_set_is_the_mean_over_its_problems():
    outcomes = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    found, means = estimators.of_set(outcomes, seed=3)
    assert list(found) == ["avg", "pass@1", "pass@2", "pass@4"]
    assert found["avg"]["value"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    assert found["pass@2"]["value"] == pytest.approx((1 / 2 + 5 / 6 + 0) / 3)
    assert found["pass@4"]["value"] == pytest.approx(2 / 3)
    assert found["avg"]["low"] <= found["avg"]["value"] <= found["avg"]["high"]
    assert means.shape == (estimators.RESAMPLES,)
    assert estimators.of_set(outcomes, seed=3)[0] == found
    assert estimators.of_set(outcomes, seed=4)[1].tolist() != means.tolist()


def test_problems_with_fewer_samples_limit_k():
    found, _ = estimators.of_set([[1, 0, 1, 1], [0, 1]], seed=0)
    assert list(found) == ["avg", "pass@1", "pass@2"]
    assert found["avg"]["value"] == pytest.approx((3 / 4 + 1 / 2) / 2)


def record(data_source, problem, sample, correct, ability="math", **more):
    return {
        "data_source": data_source, "problem": problem, "sample": sample, "correct": correct, "ability": ability, **more
    }  # fmt: skip


def test_means_over_sets_weigh_them_equally_and_are_tighter_than_one():
    generator = np.random.default_rng(0)
    records = [
        record(name, str(problem), 0, bool(generator.random() < 0.5))
        for name, size in (("a", 50), ("b", 50), ("c", 50), ("alone", 50))
        for problem in range(size)
    ]
    records = [{**r, "ability": "science" if r["data_source"] == "alone" else "math"} for r in records]
    found = summary.summarise(records, summary.planned(records))
    assert list(found["means"]) == ["math"]
    mean, sets = found["means"]["math"], found["sets"]
    assert mean["sets"] == ["a", "b", "c"]
    assert mean["value"] == pytest.approx(sum(sets[name]["avg"]["value"] for name in "abc") / 3)
    width = {name: sets[name]["avg"]["high"] - sets[name]["avg"]["low"] for name in "abc"}
    # independent sets: about 1/sqrt(3) of one set's width; were they drawn alike it would be as wide
    assert mean["high"] - mean["low"] == pytest.approx(sum(width.values()) / 3 / math.sqrt(3), rel=0.1)


def test_the_order_of_arrival_does_not_matter():
    records = [record("a", str(p), s, (p * s) % 3 == 0) for p in range(9) for s in range(4)]
    plan = summary.planned(records)
    assert plan == {"a": (9, 4)}
    assert summary.summarise(records, plan) == summary.summarise(records[::-1], plan)


def test_what_is_missing_is_counted_and_in_no_estimate():
    records = [record("a", "0", 0, True), record("a", "0", 1, False), record("a", "1", 0, True)]
    found = summary.summarise(records, {"a": (3, 2), "b": (5, 1)})["sets"]
    assert found["a"]["not_graded"] == 3
    assert found["a"]["avg"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["b"] == {"problems": 5, "n": 1, "not_graded": 5}


def test_lengths_and_cut_responses():
    ends = [("stop", 10), ("length", 30)]
    records = [record("a", str(i), 0, True, finish_reason=r, response_tokens=t) for i, (r, t) in enumerate(ends)]
    found = summary.summarise(records, summary.planned(records))["sets"]["a"]
    assert (found["cut_share"], found["response_tokens"]) == (0.5, 20)
