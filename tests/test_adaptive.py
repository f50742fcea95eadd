"""Per-prompt intervals: the rule, its search, and its state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_prefix.adaptive import START, Intervals, next_interval


def test_success_shortens_and_failure_lengthens():
    assert next_interval(0.4, 0.5, threshold=0.5) == (0.0, 0.4)
    assert next_interval(0.4, 0.49, threshold=0.5) == (0.4, 1.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)), max_size=30))
def test_intervals_stay_inside_and_rows_do_not_mix(outcomes):
    intervals, last = Intervals(0.5), {}
    for outcome in outcomes:
        intervals.update([outcome])
        last[outcome[0]] = next_interval(*outcome[1:], 0.5)
    for row in range(4):
        low, high = intervals.of(row)
        assert 0 <= low <= high <= 1
        assert (low, high) == last.get(row, START)


def test_state_survives_a_checkpoint_with_integer_and_string_rows(tmp_path):
    intervals = Intervals(0.5)
    intervals.update([(7, 0.3, 1.0), ("7", 0.6, 0.0)])
    intervals.save(tmp_path / "global_step_3")
    resumed = Intervals(0.5)
    resumed.load(tmp_path / "global_step_3")
    assert resumed.of(7) == (0.0, 0.3)
    assert resumed.of("7") == (0.6, 1.0)
    assert resumed.of(8) == START


def test_a_checkpoint_without_state_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="prefix_intervals.json"):
        Intervals(0.5).load(tmp_path)
