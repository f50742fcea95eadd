"""The curves of a report: held-out accuracy, the schedule drawn, rewards, entropy, lengths, clipping, lost groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl_prefix import run_log
from verl_prefix.comparison import Run


@dataclass(frozen=True)
class Line:
    """A metric, or the first of several that a step has. `dash` is the line's style: solid, dashed or dotted."""

    label: str
    metrics: tuple[str, ...]
    dash: str = "solid"


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]
    share: bool = False


# A run without the plugin has no prefixes: verl's own metrics then are those of on-policy rollouts.
PANELS = (
    Panel(
        "Prefix length / demonstration length, as drawn",
        (
            Line("mean", ("prefix/ratio/mean",)),
            Line("lower bound", ("prefix/low",), "dashed"),
            Line("upper bound", ("prefix/high",), "dotted"),
        ),
        share=True,
    ),
    Panel(
        "Training reward",
        (
            Line("prefixed", ("prefixed/reward",)),
            Line("on-policy", ("on_policy/reward", "critic/score/mean"), "dashed"),
        ),
    ),
    Panel(
        "Entropy (nats)",
        (
            Line("prefixed, generated", ("prefixed/entropy",)),
            Line("on-policy", ("on_policy/entropy", "actor/entropy"), "dashed"),
            Line("prefix tokens", ("prefix/prefix_entropy",), "dotted"),
        ),
    ),
    Panel(
        "Response length (tokens)",
        (
            Line("prefixed", ("prefixed/response_len",)),
            Line("on-policy", ("on_policy/response_len", "response_length/mean"), "dashed"),
        ),
    ),
    Panel(
        "Share of tokens clipped",
        (
            Line("prefixed, generated", ("prefixed/clipfrac",)),
            Line("on-policy", ("on_policy/clipfrac", "actor/pg_clipfrac"), "dashed"),
            Line("prefix tokens", ("prefix/clipfrac",), "dotted"),
        ),
    ),
    Panel(
        "Prefix tokens that keep their advantage",
        (Line("share", ("prefix/entropy_clip_kept",)),),
        share=True,
    ),
    Panel(
        "Groups without signal",
        (Line("share", ("prefix/groups_without_signal",)),),
        share=True,
    ),
)


def data(runs: Sequence[Run], max_points: int = 1000) -> dict[str, Any]:
    """{"axes": per run, "panels": [...]}, ready for JSON.

    `axes[run]` has `step` and, at the same positions, cumulated `tokens` and `hours`. A line's `runs[run]` is a pair of
    lists: positions on these axes, and values (a value that is not finite is left out). Of a run with more than
    `max_points` steps every k-th is kept, and the last; accuracies are all kept.
    """
    entries = [list(run_log.steps(run.metrics)) for run in runs]
    accuracies = [run_log.accuracies(run.metrics) for run in runs]
    axes, kept_steps = [], []
    for log, curves in zip(entries, accuracies, strict=True):
        stride = max(1, math.ceil(len(log) / max_points))
        validated = {step for curve in curves.values() for step, _ in curve}
        last = log[-1][0] if log else 0
        kept = [step for step, _ in log if step % stride == 0 or step == last or step in validated]
        axes.append(_axis(log, set(kept)))
        kept_steps.append({step: position for position, step in enumerate(kept)})

    panels = []
    for source in sorted({source for curves in accuracies for source in curves}):
        per_run = [curves.get(source, []) for curves in accuracies]
        line = {"label": "accuracy", "dash": "solid", "runs": _lines(per_run, kept_steps)}
        panels.append({"title": f"Held-out accuracy: {source}", "share": True, "exact": True, "lines": [line]})
    for panel in PANELS:
        lines = []
        for line in panel.lines:
            per_run = [_first_of(log, line.metrics) for log in entries]
            if any(per_run):
                lines.append({"label": line.label, "dash": line.dash, "runs": _lines(per_run, kept_steps)})
        if lines:
            panels.append({"title": panel.title, "share": panel.share, "exact": False, "lines": lines})
    return {"axes": axes, "panels": panels}


def _first_of(log: list[tuple[int, dict[str, float]]], names: tuple[str, ...]) -> list[tuple[int, float]]:
    # which of the names counts is a property of the run: within one curve two metrics are not mixed
    has_prefixes = any("prefix/rollout_share" in values for _, values in log)
    name = names[0] if has_prefixes else names[-1]
    return [(step, float(values[name])) for step, values in log if name in values]


def _axis(log: list[tuple[int, dict[str, float]]], kept: set[int]) -> dict[str, list[float]]:
    axis: dict[str, list[float]] = {"step": [], "tokens": [], "hours": []}
    tokens = seconds = 0.0
    for step, values in log:
        tokens += run_log.tokens_of_step(values)
        seconds += values.get("timing_s/step", 0.0)
        if step in kept:
            axis["step"].append(step)
            axis["tokens"].append(round(tokens))
            axis["hours"].append(_short(seconds / 3600))
    return axis


def _lines(per_run: list[list[tuple[int, float]]], positions: list[dict[int, int]]) -> list[list[list[float]] | None]:
    lines: list[list[list[float]] | None] = []
    for curve, position in zip(per_run, positions, strict=True):
        points = [(position[step], _short(value)) for step, value in curve if step in position and math.isfinite(value)]
        lines.append([list(column) for column in zip(*points, strict=True)] if points else None)
    return lines


def _short(value: float) -> float:
    return float(f"{value:.5g}")
