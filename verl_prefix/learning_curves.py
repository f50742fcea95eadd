"""The picture of a run: held-out accuracy, prefix ratio and rewards over steps, several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from verl_prefix import run_log

_COLOURS = ("#2066a8", "#c46666", "#3f8f6b", "#8a6bb0", "#b5892b", "#4d4d4d")
_STYLES = ("-", "--", ":", "-.")


def draw(runs: Mapping[str, Path], picture: Path) -> None:
    """Write a PNG of the runs (label -> metrics file) to `picture`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (accuracy, prefixes, rewards) = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    for colour, (label, file) in zip(_COLOURS * len(runs), runs.items(), strict=False):
        for style, (source, curve) in zip(_STYLES, sorted(run_log.accuracies(file).items()), strict=False):
            accuracy.plot(*zip(*curve, strict=True), style, color=colour, marker="o", ms=3, label=f"{label}: {source}")
        ratio = run_log.series(file, "prefix/ratio/mean")
        if ratio:
            low = run_log.series(file, "prefix/low")
            prefixes.plot(*zip(*ratio, strict=True), ".", ms=3, color=colour, label=f"{label}: drawn, mean")
            prefixes.plot(*zip(*low, strict=True), color=colour, label=f"{label}: lower bound")
        for style, side in (("-", "prefixed"), ("--", "on_policy")):
            curve = _smooth(run_log.series(file, f"{side}/reward"))
            if curve:
                rewards.plot(*zip(*curve, strict=True), style, color=colour, label=f"{label}: {side}")
    for axis, title in (
        (accuracy, "Held-out accuracy (no prefix)"),
        (prefixes, "Prefix length / demonstration length"),
        (rewards, "Training reward, mean of 10 steps"),
    ):
        axis.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # below: hides no curve
        else:
            axis.text(0.5, 0.5, "no prefixed rollouts", ha="center", transform=axis.transAxes, color="grey")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _smooth(curve: list[tuple[int, float]], width: int = 10) -> list[tuple[int, float]]:
    windows = ((curve[i][0], [value for _, value in curve[max(0, i - width + 1) : i + 1]]) for i in range(len(curve)))
    return [(step, sum(values) / len(values)) for step, values in windows]
