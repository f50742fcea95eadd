"""A scheduled value as a function of the training step: low_t, the lower bound of the prefix ratio
(arXiv 2507.01679, Sec. 3.1), or mu_t, the weight of the SFT term.
"""

from __future__ import annotations

import math

from verl_prefix.config import ScheduleConfig


def value_at(schedule: ScheduleConfig, step: int) -> float:
    """The value at training step `step`; for the prefix ratio, low_t in [0, 1].

    Three phases: `warmup` steps on a line from `target` up to `initial`, `delay` steps at `initial`, then the way from
    `initial` to `target` over `steps` steps, and `target` ever after (`kind=constant`: `initial` ever after). The
    cosine is the paper's low_t = target + (1 + cos(pi t / steps)) / 2 * (initial - target), with t counted from the end
    of `delay`; `stairs` spends equal shares of `steps` on each of its levels, the last of which is `target`.

    Args:
        schedule: shape and end points.
        step: training step, from 0; a negative one counts as 0.
    """
    initial, target = schedule.initial, schedule.target
    step = max(step, 0)
    if step < schedule.warmup:
        return target + (initial - target) * step / schedule.warmup
    t = min(max(step - schedule.warmup - schedule.delay, 0), schedule.steps)
    if t == 0 or schedule.kind == "constant":
        return initial  # as written, free of rounding: low_t must not exceed `high` by one bit
    if t == schedule.steps:
        return target
    if schedule.kind == "stairs":
        level = t * schedule.stairs // schedule.steps
        return initial + (target - initial) * level / (schedule.stairs - 1)
    if schedule.kind == "linear":
        return target + (1 - t / schedule.steps) * (initial - target)
    return target + 0.5 * (1 + math.cos(math.pi * t / schedule.steps)) * (initial - target)
