"""The table and the picture of docs/methods.md, read off the presets themselves.

    python docs/make_methods.py          # rewrites both

A test compares the page with `table()`, so that neither can rot.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from hydra import compose, initialize
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

from verl_prefix import hydra_group, presets
from verl_prefix.config import PrefixConfig

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


class Terms(NamedTuple):
    """What a preset does, in words."""

    demonstration: str
    policy_on_demonstration: str
    policy_on_own: str
    advantage: str
    sft: str
    gate: str


def composed(preset: str):
    import hydra

    hydra_group.register(hydra)
    with initialize(version_base=None, config_path=None):
        return compose(overrides=[f"+prefix={preset}"])


def terms(preset: str) -> Terms:
    """The axes of `preset` as one line of the table."""
    config = composed(preset)
    prefix, n = PrefixConfig.of(config.prefix), config.actor_rollout_ref.rollout.n
    return Terms(
        _demonstration(prefix, n),
        _policy_on_demonstration(prefix),
        _policy_on_own(prefix),
        _advantage(prefix, config.algorithm.adv_estimator),
        _sft(prefix),
        _gate(prefix),
    )


def _demonstration(prefix: PrefixConfig, n: int) -> str:
    sampling, schedule = prefix.sampling, prefix.schedule
    if sampling.rollouts == 0:
        return "none"
    way = f"{schedule.initial:g}" if schedule.kind == "constant" else f"{schedule.initial:g}→{schedule.target:g}"
    length = {
        "beta": f"U({way}, {sampling.high:g})",
        "fixed": way,
        "binomial": f"Binomial({sampling.parts}, {way})/{sampling.parts}" + " of the steps" * sampling.at_steps,
        "whole": "whole + EOS",
        "adaptive": "U(a, b) of the prompt",
    }[sampling.law]
    who = "all, one prefix" if sampling.rollouts == n else f"{sampling.rollouts} of {n}"
    until = f", to step {sampling.until}" if sampling.until else ""
    share = prefix.demonstrations.demo_ratio
    rows = f", {share:.0%} of the rows" if share < 1 else ""
    return f"{who}: {length}{until}{rows}"


def _policy_on_demonstration(prefix: PrefixConfig) -> str:
    loss, clip = prefix.loss, prefix.entropy_clip
    if prefix.sampling.rollouts == 0 or not loss.update_prefix:
        return "–"
    form = {"ppo": "PPO", "p": "p", "shaped": "p/(p+0.1)", "mis": "2p/(p_old+(p_old+1)/2)"}[loss.prefix_ratio]
    if loss.prefix_focus:
        form += f" · (1−p)^{loss.prefix_focus:g}"
    if prefix.advantage.prefix_weight != 1:
        form += f" · {prefix.advantage.prefix_weight:g}"
    kept = (
        "all tokens"
        if clip.keep == "all"
        else f"{clip.keep} {clip.share:.0%}" + (" by H" if clip.keep != "random" else "")
    )
    return f"{form}, {kept}"


def _policy_on_own(prefix: PrefixConfig) -> str:
    if prefix.loss.policy_ratio == "log":
        return "−A log p"
    return "PPO" if prefix.loss.policy_clip == "same" else "unclipped ratio"


def _advantage(prefix: PrefixConfig, estimator: str) -> str:
    options = prefix.advantage
    if estimator == "grpo":
        return "(R−mean)/std of the group"
    over = "the group" if options.baseline == "group" else "its own rollouts"
    base = f"(R−mean)/std of {over}" if options.normalize_std else f"R−mean of {over}"
    return base + (f"; own: {options.likelihood_weight:g}·e^H or −1" if options.on_policy == "likelihood" else "")


def _sft(prefix: PrefixConfig) -> str:
    weight = prefix.sft.weight
    if max(weight.initial, weight.target) == 0:
        return "–"
    mu = f"{weight.initial:g}" if weight.kind == "constant" else f"{weight.initial:g}→{weight.target:g}"
    token = {"none": "", "p": " · p", "p_1_p": " · p(1−p)", "trust": " · ∇p/max(p, 0.1)"}[prefix.sft.token_weight]
    row = {"none": "", "entropy": " · e^−H"}[prefix.sft.row_weight]
    mixed = ", policy term × (1−μ)" if prefix.sft.mix == "convex" else ""
    return f"{mu}{row}{token}{mixed}"


def _gate(prefix: PrefixConfig) -> str:
    gate = prefix.gate
    if gate.max_correct is None:
        return "–"
    return f"≤ {gate.max_correct} right: demonstration only; else own rollouts only"


def table() -> str:
    """The Markdown table, one line a preset."""
    head = (
        "preset",
        "demonstration tokens",
        "policy term on them",
        "policy term on own tokens",
        "advantage",
        "SFT term μ",
        "gate",
    )
    lines = [head, ("---",) * len(head), *((f"`{name}`", *terms(name)) for name in presets.names())]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


COLOURS = {
    "policy term, own tokens": "#2066a8",
    "policy term, demonstration tokens": "#8fc0e8",
    "SFT term": "#e0a458",
    "policy and SFT term": "#7a4fa3",
    "context only": "#d9d9d9",
}


def picture(file: Path) -> None:
    """Four rollouts of a group for every preset; the colour of a token says which terms it is in."""
    names = presets.names()
    columns = 5
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 1.55 * rows + 0.6), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        config = composed(name)
        _glyph(axis, PrefixConfig.of(config.prefix), config.actor_rollout_ref.rollout.n)
        axis.set_title(name, fontsize=10, family="monospace", loc="left")
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    handles.append(Patch(facecolor="white", edgecolor="#555555", hatch="////", label="dropped by the gate, by prompt"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _glyph(axis, prefix: PrefixConfig, n: int) -> None:
    """A group as four bars, the first of them the prefixed one (all, where all are)."""
    shown = 4
    prefixed = shown if prefix.sampling.rollouts == n else min(prefix.sampling.rollouts, 1)
    sft = max(prefix.sft.weight.initial, prefix.sft.weight.target) > 0
    if prefix.loss.update_prefix:
        kind = "policy and SFT term" if sft else "policy term, demonstration tokens"
    else:
        kind = "SFT term" if sft else "context only"
    for bar in range(shown):
        cut = 0.0 if bar >= prefixed else {"whole": 1.0, "fixed": 0.5, "binomial": 0.6}.get(prefix.sampling.law, 0.55)
        top = shown - 1 - bar
        axis.add_patch(Rectangle((0, top), cut, 0.75, color=COLOURS[kind], lw=0))
        axis.add_patch(Rectangle((cut, top), 1 - cut, 0.75, color=COLOURS["policy term, own tokens"], lw=0))
        if cut and kind != "context only" and prefix.entropy_clip.keep != "all" and prefix.loss.update_prefix:
            share = round(8 * prefix.entropy_clip.share)
            for i in range(8):  # tokens outside of the entropy clip are in the loss with advantage 0
                if (i * 3) % 8 >= share:
                    axis.add_patch(Rectangle((cut * i / 8, top), cut / 8, 0.75, color=COLOURS["context only"], lw=0))
        if prefix.gate.max_correct is not None:
            axis.add_patch(Rectangle((0, top), 1, 0.75, fill=False, hatch="////", ec="#ffffff", lw=0))
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.1, shown))


def main() -> None:
    page = HERE / "methods.md"
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}{table()}{END}", page.read_text(), flags=re.S)
    page.write_text(text)
    picture(HERE / "methods.png")


if __name__ == "__main__":
    main()
