"""Prefix draws: bounds, purity, distributions. Seeds are fixed, so the statistical tests never flake."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_prefix.config import DemonstrationConfig, PrefixConfig, SamplingConfig, ScheduleConfig
from verl_prefix.sampling import (
    PrefixDraw,
    Stream,
    draw_prefix,
    is_prefixed_session,
    keeps_demonstrations,
    random_word,
)


def config(*, seed=0, demo_ratio=1.0, schedule=None, **sampling) -> PrefixConfig:
    return PrefixConfig(
        seed=seed,
        demonstrations=DemonstrationConfig(demo_ratio=demo_ratio),
        schedule=schedule or ScheduleConfig(kind="constant", initial=0.05),
        sampling=SamplingConfig(**sampling),
    )


def draw(cfg, *, step=0, row_index=0, session_id=0, demo_lens=(1000,)) -> PrefixDraw | None:
    return draw_prefix(cfg, step=step, row_index=row_index, session_id=session_id, demo_lens=demo_lens)


def ks_distance(sample, cdf) -> float:
    """Kolmogorov-Smirnov: the largest gap between the sample's distribution and `cdf`."""
    x = np.sort(sample)
    expected, n = cdf(x), len(x)
    return max(np.max(np.arange(1, n + 1) / n - expected), np.max(expected - np.arange(n) / n))


ratio = st.floats(0, 1)


# --- bounds ---


@settings(max_examples=200, deadline=None)
@given(
    bounds=st.tuples(ratio, ratio).map(sorted),
    step=st.integers(0, 600),
    row_index=st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=8)),
    demo_lens=st.lists(st.integers(0, 300), max_size=4),
    min_prefix_len=st.integers(1, 400),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_a_cut_keeps_its_bounds(bounds, step, row_index, demo_lens, min_prefix_len, kind):
    initial, high = bounds
    schedule = ScheduleConfig(kind=kind, initial=initial, target=initial / 2)
    cfg = config(schedule=schedule, high=high, min_prefix_len=min_prefix_len)
    got = draw(cfg, step=step, row_index=row_index, demo_lens=demo_lens)
    if all(length < 2 for length in demo_lens):
        assert got is None
        return
    assert got.demo_len == demo_lens[got.demo_index] >= 2
    assert 1 <= got.prefix_len <= got.demo_len - 1
    assert initial / 2 <= got.low <= got.ratio <= got.high == high
    shortest = max(math.floor(got.low * got.demo_len), min_prefix_len)
    longest = max(math.floor(high * got.demo_len), min_prefix_len)
    assert min(shortest, got.demo_len - 1) <= got.prefix_len <= min(longest, got.demo_len - 1)
    assert got.prefix_len == min(max(math.floor(got.ratio * got.demo_len), min_prefix_len), got.demo_len - 1)


def test_low_follows_the_schedule_and_the_step_reaches_it():
    cfg = PrefixConfig()
    assert draw(cfg, step=0).low == draw(cfg, step=0).high == 0.95
    assert draw(cfg, step=0).prefix_len == 950
    assert draw(cfg, step=500).low == 0.05


def test_min_prefix_len_raises_and_the_demonstration_limits():
    zero = ScheduleConfig(kind="constant", initial=0.0, target=0.0)
    short = config(schedule=zero, high=0.0, min_prefix_len=7)
    assert draw(short, demo_lens=[100]).prefix_len == 7
    assert draw(short, demo_lens=[5]).prefix_len == 4
    whole = config(schedule=ScheduleConfig(kind="constant", initial=1.0), high=1.0)
    assert draw(whole, demo_lens=[5]).prefix_len == 4


def test_no_prefix_without_a_cuttable_demonstration():
    assert draw(config(), demo_lens=[]) is None
    assert draw(config(), demo_lens=[0, 1]) is None
    assert all(draw(config(), row_index=row, demo_lens=[1, 50, 0]).demo_index == 1 for row in range(50))


# --- which rollouts and rows ---


@pytest.mark.parametrize("rollouts", [0, 1, 3, 8])
def test_the_first_sessions_are_prefixed(rollouts):
    cfg = config(rollouts=rollouts)
    expected = [session < rollouts for session in range(8)]
    assert [is_prefixed_session(cfg, session) for session in range(8)] == expected
    assert [draw(cfg, session_id=session) is not None for session in range(8)] == expected


def test_demo_ratio_keeps_its_share_of_rows_and_is_nested():
    kept = {
        share: {row for row in range(5000) if keeps_demonstrations(config(demo_ratio=share), row)}
        for share in (0.0, 0.01, 0.1, 0.5, 1.0)
    }
    assert len(kept[0.0]) == 0
    assert len(kept[1.0]) == 5000
    assert kept[0.01] < kept[0.1] < kept[0.5]
    for share in (0.01, 0.1, 0.5):  # four standard deviations
        assert abs(len(kept[share]) - 5000 * share) < 4 * math.sqrt(5000 * share * (1 - share))
    assert kept[0.5] != {row for row in range(5000) if keeps_demonstrations(config(demo_ratio=0.5, seed=1), row)}


def test_a_row_without_its_demonstrations_never_draws():
    cfg = config(demo_ratio=0.5, rollouts=2)
    for row in range(100):
        drawn = {draw(cfg, row_index=row, session_id=s, step=t) is not None for s in (0, 1) for t in (0, 1)}
        assert drawn == {keeps_demonstrations(cfg, row)}


# --- purity ---


def test_the_same_key_gives_the_same_draw():
    cfg = config(rollouts=3)
    first = [
        draw(cfg, step=s, row_index=r, session_id=k, demo_lens=[99, 77])
        for s in (0, 1)
        for r in (0, "a")
        for k in (0, 2)
    ]
    np.random.seed(1)  # global state must not matter
    again = [
        draw(cfg, step=s, row_index=r, session_id=k, demo_lens=[99, 77])
        for s in (0, 1)
        for r in (0, "a")
        for k in (0, 2)
    ]
    assert first == again


def test_every_part_of_the_key_matters():
    cfg = config(rollouts=8)
    base = draw(cfg).ratio
    others = [
        draw(cfg, step=1).ratio,
        draw(cfg, row_index=1).ratio,
        draw(cfg, row_index=-1).ratio,
        draw(cfg, row_index="0").ratio,
        draw(cfg, row_index=2**32).ratio,
        draw(cfg, session_id=1).ratio,
        draw(replace(cfg, seed=1)).ratio,
    ]
    assert len({base, *others}) == 8
    keys = {
        (s, r, k): draw(cfg, step=s, row_index=r, session_id=k).ratio
        for s in range(8)
        for r in range(8)
        for k in range(8)
    }
    assert len(set(keys.values())) == len(keys)  # neither do two parts swap


def test_integers_of_any_kind_and_large_words_are_told_apart():
    assert draw(config(), row_index=np.int64(-5)) == draw(config(), row_index=-5)
    assert draw(config(), row_index=np.str_("x")) == draw(config(), row_index="x")
    assert random_word(Stream.CHOICE, 2**32, 0) != random_word(Stream.CHOICE, 0, 1)
    assert random_word(Stream.CHOICE, 1) != random_word(Stream.CHOICE, 1, 0) != random_word(Stream.POSITION, 1, 0)
    with pytest.raises(TypeError):
        draw(config(), row_index=1.5)


def test_words_are_pinned():
    """A change here changes the draws of every published run."""
    assert random_word(Stream.POSITION, 0, 17, 4, 0) == 11415743656439925768
    assert random_word(Stream.DEMO_RATIO, 0, "openr1/00017") == 2594583750067684309


def test_shared_draws_are_the_same_for_all_sessions_of_a_row():
    shared = config(rollouts=4, shared=True)
    for row in range(20):
        draws = {draw(shared, row_index=row, session_id=session, demo_lens=[90, 80, 70]) for session in range(4)}
        assert len(draws) == 1
    assert len({draw(shared, row_index=row) for row in range(20)}) == 20
    assert len({draw(shared, step=step) for step in range(20)}) == 20
    assert len({draw(config(rollouts=4), session_id=session) for session in range(4)}) == 4


# --- distributions ---


def ratios(cfg, n=4000):
    """Position between low and high, over rows, steps and sessions."""
    draws = [draw(cfg, row_index=i // 8, session_id=i % 2, step=i // 2 % 4) for i in range(n)]
    return np.array([(d.ratio - d.low) / (d.high - d.low) for d in draws])


def test_the_ratio_is_uniform():
    sample = ratios(config(rollouts=2))
    assert ks_distance(sample, lambda x: x) < 1.63 / math.sqrt(len(sample))  # the 1 % point
    for lag in (1, 2, 8):  # neighbours in session, step and row
        assert abs(np.corrcoef(sample[lag:], sample[:-lag])[0, 1]) < 4 / math.sqrt(len(sample))


def test_the_ratio_follows_beta():
    sample = ratios(config(rollouts=2, beta_a=2.0, beta_b=5.0))

    def cdf(x):  # Beta(2, 5): P(at least 2 of 6 uniforms are below x)
        return 1 - (1 - x) ** 6 - 6 * x * (1 - x) ** 5

    assert ks_distance(sample, cdf) < 1.63 / math.sqrt(len(sample))
    assert sample.mean() == pytest.approx(2 / 7, abs=0.01)
    assert sample.var() == pytest.approx(10 / (49 * 8), abs=0.002)
    assert ks_distance(sample, lambda x: x) > 0.2  # the bound above can tell


def test_demonstrations_are_chosen_uniformly_and_independently_of_the_cut():
    draws = [draw(config(), row_index=i, demo_lens=[1000, 1, 1000, 1000]) for i in range(6000)]
    index = np.array([d.demo_index for d in draws])
    assert sorted(set(index)) == [0, 2, 3]
    counts = np.bincount(index)[[0, 2, 3]]
    assert ((counts - 2000) ** 2 / 2000).sum() < 9.2  # chi-square with 2 degrees of freedom, 1 % point
    means = [np.mean([d.ratio for d in draws if d.demo_index == i]) for i in (0, 2, 3)]
    assert means == pytest.approx([0.5] * 3, abs=0.02)


# --- laws ---


def law(name, **more):
    schedule = {"kind": "constant", "initial": more.pop("at", 0.5)}
    return PrefixConfig.of({"sampling": {"law": name, **more}, "schedule": schedule})


def lengths(config, count=4000, demo_len=100, **more):
    draws = [draw_prefix(config, step=1, row_index=r, session_id=0, demo_lens=[demo_len], **more) for r in range(count)]
    return np.array([0 if draw is None else draw.prefix_len for draw in draws])


def test_whole_is_the_whole_demonstration():
    draw = draw_prefix(law("whole"), step=1, row_index=0, session_id=0, demo_lens=[17])
    assert draw.is_whole
    assert draw.prefix_len == draw.demo_len == 17
    assert not draw_prefix(law("beta"), step=1, row_index=0, session_id=0, demo_lens=[17]).is_whole


@pytest.mark.parametrize(("at", "expected"), [(0.5, 50), (0.25, 25), (1.0, 99), (0.0, 1)])
def test_fixed_follows_the_schedule_to_the_token(at, expected):
    assert set(lengths(law("fixed", at=at), count=50)) == {expected}


def test_binomial_has_its_probabilities():
    p, n, parts = 0.3, 20000, 5
    drawn = lengths(law("binomial", at=p, parts=parts), count=n)
    for k in range(parts + 1):
        expected = math.comb(parts, k) * p**k * (1 - p) ** (parts - k)
        length = min(20 * k, 99)
        deviation = math.sqrt(expected * (1 - expected) / n)
        assert abs((drawn == length).mean() - expected) < 5 * deviation
    assert set(drawn) <= {0, 20, 40, 60, 80, 99}


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("steps", [[12], [12, 30, 80], [5, 12, 30, 44, 60], [3, 8, 12, 30, 44, 60, 81]])
def test_at_steps_binomial_counts_runs_of_steps(parts, steps):
    """As UFT's code: the bounds of the runs are the steps round(i / n S), n = min(parts, S)."""
    p, count, demo_len = 0.3, 20000, 100
    drawn = lengths(law("binomial", at=p, parts=parts, at_steps=True), count=count, demo_steps=[steps])
    n = min(parts, len(steps))
    bounds = [0] + [steps[round(i / n * len(steps)) - 1] for i in range(1, n + 1)]
    assert bounds[-1] == steps[-1] < demo_len
    for k, length in enumerate(bounds):
        expected = math.comb(n, k) * p**k * (1 - p) ** (n - k)
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs((drawn == length).mean() - expected) < 5 * deviation
    assert set(drawn) <= set(bounds)


def test_at_steps_the_last_token_is_the_policys_and_no_token_is_a_plain_rollout():
    config = law("binomial", at=1.0, at_steps=True)
    (length,) = set(lengths(config, count=5, demo_len=100, demo_steps=[[40, 100]]))
    assert length == 99
    assert set(lengths(config, count=5, demo_steps=[[0, 0]])) == {0}
    draw = draw_prefix(config, step=1, row_index=0, session_id=0, demo_lens=[100], demo_steps=[[40, 80]])
    assert (draw.prefix_len, draw.ratio) == (80, 0.8)


def test_at_steps_a_demonstration_without_steps_is_cut_by_tokens():
    by_tokens = lengths(law("binomial", at=0.5))
    for none in ([()], ()):
        assert (lengths(law("binomial", at=0.5, at_steps=True), demo_steps=none) == by_tokens).all()
    assert (lengths(law("binomial", at=0.5), demo_steps=[[7]]) == by_tokens).all(), "nobody asked for steps"


def test_adaptive_is_uniform_on_the_interval_and_may_be_plain():
    drawn = lengths(law("adaptive"), interval=(0.2, 0.6))
    assert drawn.min() == 20
    assert 58 <= drawn.max() <= 60
    assert abs(drawn.mean() - 39.5) < 5 * 0.4 * 100 / math.sqrt(12 * len(drawn))
    assert set(lengths(law("adaptive"), count=50, interval=(0.0, 0.005))) == {0}
    short = draw_prefix(law("adaptive"), step=1, row_index=0, session_id=0, demo_lens=[100], interval=(0.0, 0.005))
    assert 0 < short.ratio < 0.005, "the draw is on record, so that a failure can lengthen the next one"


def test_no_prefixes_after_the_last_step():
    config = PrefixConfig.of({"sampling": {"until": 300}})
    drawn = [draw_prefix(config, step=s, row_index=0, session_id=0, demo_lens=[50]) for s in (1, 300, 301, 500)]
    assert [draw is None for draw in drawn] == [False, False, True, True]
