"""low_t against its formula and at its end points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_prefix.config import ScheduleConfig
from verl_prefix.schedule import value_at


def test_defaults_are_the_papers_cosine():
    schedule = ScheduleConfig()
    for step in range(0, 700, 7):
        t = min(step, 500)
        assert value_at(schedule, step) == pytest.approx(
            0.05 + 0.5 * (1 + math.cos(math.pi * t / 500)) * 0.9, abs=1e-12
        )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_end_points_are_exact(kind):
    schedule = ScheduleConfig(kind=kind)
    assert value_at(schedule, 0) == value_at(schedule, -3) == 0.95
    assert value_at(schedule, 250) == pytest.approx(0.5)
    assert value_at(schedule, 500) == value_at(schedule, 10_000) == 0.05
    assert 0.05 < value_at(schedule, 499) < value_at(schedule, 1) < 0.95


def test_linear_and_cosine_differ_between_the_ends():
    assert value_at(ScheduleConfig(kind="linear"), 125) == pytest.approx(0.05 + 0.75 * 0.9)
    assert value_at(ScheduleConfig(kind="cosine"), 125) == pytest.approx(0.05 + (2 + math.sqrt(2)) / 4 * 0.9)


def test_stairs_spend_equal_shares_on_each_level():
    halves = ScheduleConfig(kind="stairs", initial=0.5, target=0.25, steps=500)
    assert [value_at(halves, step) for step in (0, 1, 249, 250, 499, 500, 900)] == [
        0.5,
        0.5,
        0.5,
        0.25,
        0.25,
        0.25,
        0.25,
    ]
    thirds = ScheduleConfig(kind="stairs", initial=0.9, target=0.1, steps=30, stairs=3)
    levels = [value_at(thirds, step) for step in range(30)]
    assert levels == pytest.approx([0.9] * 10 + [0.5] * 10 + [0.1] * 10)


def test_constant_stays_at_initial():
    schedule = ScheduleConfig(kind="constant", initial=0.3)
    assert {value_at(schedule, step) for step in (0, 1, 499, 500, 9999)} == {0.3}


def test_warmup_then_delay_then_the_way_down():
    schedule = ScheduleConfig(kind="linear", initial=0.9, target=0.1, steps=10, warmup=4, delay=3)
    expected = [0.1, 0.3, 0.5, 0.7, 0.9, 0.9, 0.9, 0.9, 0.82, 0.74, 0.66, 0.58, 0.5, 0.42, 0.34, 0.26, 0.18, 0.1, 0.1]
    assert [value_at(schedule, step) for step in range(19)] == pytest.approx(expected)


def test_warmup_also_leads_to_a_constant():
    schedule = ScheduleConfig(kind="constant", initial=0.8, target=0.2, warmup=2)
    assert [value_at(schedule, step) for step in range(4)] == pytest.approx([0.2, 0.5, 0.8, 0.8])


ratio = st.floats(0, 1, allow_subnormal=False)


@given(
    kind=st.sampled_from(["constant", "linear", "cosine", "stairs"]),
    initial=ratio,
    target=ratio,
    steps=st.integers(1, 50),
    delay=st.integers(0, 20),
    warmup=st.integers(0, 20),
    step=st.integers(0, 120),
)
def test_stays_between_its_ends_and_ends_at_the_target(kind, initial, target, steps, delay, warmup, step):
    schedule = ScheduleConfig(kind, initial, target, steps, delay, warmup)
    assert min(initial, target) - 1e-12 <= value_at(schedule, step) <= max(initial, target) + 1e-12
    assert value_at(schedule, warmup) == value_at(schedule, warmup + delay) == initial
    assert value_at(schedule, warmup + delay + steps) == (initial if kind == "constant" else target)
    if warmup:
        assert value_at(schedule, 0) == target
