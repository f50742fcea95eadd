"""The picture of a preview: the schedule with the drawn ratios, and lengths against their limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_prefix.config import PrefixConfig
from verl_prefix.preview import Look, PrefixedRollout
from verl_prefix.sampling import ratio_bounds

_BLUE, _RED, _GREY = "#2066a8", "#c46666", "#4d4d4d"
_POINTS = 400
_BINS = 40
#: lengths beyond this many times the limit share the last bar, so that one of 10 MB does not flatten the others
_FAR = 4


def draw(
    config: PrefixConfig,
    found: Look,
    rollouts: Sequence[PrefixedRollout],
    steps: Sequence[int],
    picture: Path,
    *,
    prompt_length: int,
    response_length: int,
) -> None:
    """Write a PNG to `picture`; lengths and limits in tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (schedule, prompts, demos) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    _schedule(schedule, config, rollouts, steps)
    _lengths(prompts, found.prompt_lens, prompt_length, "Prompts", "data.max_prompt_length")
    # a demonstration needs room for its EOS
    _lengths(demos, found.demo_lens, response_length - 1, "Demonstrations", "data.max_response_length - 1")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)


def _schedule(axis: Any, config: PrefixConfig, rollouts: Sequence[PrefixedRollout], steps: Sequence[int]) -> None:
    axis.set(title=f"Prefix ratio, preset {config.preset}", xlabel="training step", ylim=(-0.03, 1.03))
    axis.set_ylabel("prefix / demonstration")
    if not config.sampling.rollouts:
        axis.text(0.5, 0.5, "no prefixed rollouts", ha="center", transform=axis.transAxes, color="grey")
        return
    schedule = config.schedule
    last = max(schedule.warmup + schedule.delay + schedule.steps, *steps)
    xs = sorted({round(i * last / _POINTS) for i in range(_POINTS + 1)})
    lows, highs = zip(*(ratio_bounds(config, x) for x in xs), strict=True)
    axis.fill_between(xs, lows, highs, color=_BLUE, alpha=0.15, label="range of the draws")
    axis.plot(xs, lows, color=_BLUE, label="low")
    axis.plot(xs, highs, color=_BLUE, ls="--", lw=1, label="high")
    for step in steps:
        axis.axvline(step, color=_GREY, ls=":", lw=1)
    if rollouts:
        ratios = [rollout.draw.ratio for rollout in rollouts]
        axis.plot([rollout.step for rollout in rollouts], ratios, ".", color=_RED, ms=6, label="previewed rollouts")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")


def _lengths(axis: Any, lengths: Sequence[int], limit: int, what: str, name: str) -> None:
    over = sum(length > limit for length in lengths)
    axis.set(title=f"{what}: {over} of {len(lengths)} over the limit", xlabel="tokens", ylabel="count")
    if not lengths:
        axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes, color="grey")
        return
    far = _FAR * limit
    end = min(max(limit, *lengths), far) + 1
    axis.hist([min(length, far) for length in lengths], bins=_BINS, range=(0, end), color=_BLUE)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.axvline(limit, color=_RED, ls="--", label=f"{name} = {limit}")
    if max(lengths) > far:
        axis.set_xlabel(f"tokens (the last bar: {far} and more, up to {max(lengths)})")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
