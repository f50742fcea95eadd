"""Prefix lengths that follow each prompt's own success: `law=adaptive`, after AdaBack (arXiv 2506.18110).

Each training row has an interval [a, b] of the prefix ratio, [0, 1] at first. Its prefixed rollouts of a step share one
ratio l ~ U(a, b). If their mean reward reaches the threshold, l was help enough and the next interval is [0, l]; if
not, more is needed and it is [l, 1]. The state is one pair of numbers per row seen so far; it is kept on the driver
and saved with the checkpoint, so that a resumed run goes on with the same intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

Interval = tuple[float, float]
START: Interval = (0.0, 1.0)
FILE_NAME = "prefix_intervals.json"


def next_interval(ratio: float, mean_reward: float, threshold: float) -> Interval:
    """The interval after a step with prefixes of ratio `ratio` and this mean reward."""
    return (0.0, ratio) if mean_reward >= threshold else (ratio, 1.0)


class Intervals:
    """The interval of every training row, by its `extra_info.index` (an integer or a string)."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._of: dict[int | str, Interval] = {}

    def of(self, row_index: int | str) -> Interval:
        return self._of.get(row_index, START)

    def update(self, outcomes: Iterable[tuple[int | str, float, float]]) -> None:
        """Move the intervals by (row index, ratio, mean reward of its prefixed rollouts) of one step."""
        for row_index, ratio, mean_reward in outcomes:
            self._of[row_index] = next_interval(ratio, mean_reward, self.threshold)

    def save(self, folder: Path) -> None:
        """Write the state to `folder` (a list of pairs: JSON object keys would turn integers into strings)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(json.dumps([[row, *interval] for row, interval in self._of.items()]))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the checkpoint has no state, so the run that wrote it was not adaptive.
        """
        self._of = {row: (low, high) for row, low, high in json.loads((folder / FILE_NAME).read_text())}
