"""The `prefix` section of a run's configuration: typed, ranged, documented.

The class defaults are Prefix-RFT as published (arXiv 2507.01679, Sec. 3 and 4.1); a preset under
`verl_prefix/conf/prefix/` overrides only what differs. `PrefixConfig` is also the Hydra schema of the section, so a
wrong type or an unknown key fails when the command line is parsed, and `__post_init__` checks the ranges.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_prefix.exceptions import PrefixConfigError


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its documentation and its range, both readable by tools."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})


class Section:
    """Checks every field against the range it declares. Errors name key, value and mend."""

    key = "prefix"

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, meta = getattr(self, f.name), f.metadata
            name = f"{self.key}.{f.name}"
            if value is None or "doc" not in meta:
                continue
            if meta["choices"] and value not in meta["choices"]:
                raise PrefixConfigError(name, value, f"choose one of {', '.join(map(str, meta['choices']))}.")
            if meta["low"] is not None and value < meta["low"]:
                raise PrefixConfigError(name, value, f"must be at least {meta['low']}. {meta['doc']}")
            if meta["high"] is not None and value > meta["high"]:
                raise PrefixConfigError(name, value, f"must be at most {meta['high']}. {meta['doc']}")


@dataclass
class DemonstrationConfig(Section):
    """Which demonstrations a training row offers."""

    key = "prefix.demonstrations"

    column: str = option("demos", "Column of the training file with the row's demonstrations (`list[str]`).")
    correct_column: str = option(
        "demos_correct",
        "Column with one bool per demonstration (`list[bool]`); those marked False are not used. May be missing.",
    )
    steps_column: str = option(
        "demos_steps",
        "Column with the ends of each demonstration's steps in characters (`list[list[int]]`), for "
        "`prefix.sampling.at_steps`. May be missing.",
    )
    demo_ratio: float = option(
        1.0,
        "Share of the training rows that keep their demonstrations; which ones depends on `prefix.seed` and the row "
        "index alone. The paper's ablation uses 0.1 and 0.01.",
        low=0.0,
        high=1.0,
    )


@dataclass
class ScheduleConfig(Section):
    """A value that goes from `initial` to `target`; here low_t, the lower bound of the prefix ratio at step t.

    Cosine (paper, Sec. 3.1): low_t = target + (1 + cos(pi t / steps)) / 2 * (initial - target), t in [0, steps].
    """

    key = "prefix.schedule"

    kind: str = option(
        "cosine",
        "Shape of the way from `initial` to `target`; `stairs` goes in `stairs` equal levels, both ends included.",
        choices=("constant", "linear", "cosine", "stairs"),
    )
    initial: float = option(0.95, "low_t at the start (a ratio of the demonstration).", low=0.0, high=1.0)
    target: float = option(0.05, "low_t after `steps` steps.", low=0.0, high=1.0)
    steps: int = option(500, "T, the number of training steps from `initial` to `target`.", low=1)
    delay: int = option(0, "Steps that stay at `initial` before the way to `target` starts.", low=0)
    warmup: int = option(
        0, "Steps over which the value first rises linearly from `target` to `initial`, before delay.", low=0
    )
    stairs: int = option(2, "Levels of `kind=stairs`.", low=2)


@dataclass
class SamplingConfig(Section):
    """Who gets demonstration tokens, and how many.

    A prefix has floor(l |y*|) tokens, at least `min_prefix_len` and at most |y*| - 1; `law` says how l is drawn:

    - `beta`: l = low_t + (high - low_t) Beta(beta_a, beta_b) (Prefix-RFT; uniform at 1 and 1).
    - `fixed`: l = low_t (static or scheduled hints).
    - `binomial`: l = k / parts with k ~ Binomial(parts, low_t); k = 0 is a plain rollout (UFT). With `at_steps` the
      parts are runs of the demonstration's own steps.
    - `whole`: the whole demonstration and an EOS, without a generation call (LUFFY and others).
    - `adaptive`: l ~ U(a, b) with the prompt's own interval, which its past rewards move (AdaBack).
    """

    key = "prefix.sampling"

    rollouts: int = option(1, "Prefixed rollouts per prompt (of `actor_rollout_ref.rollout.n`).", low=0)
    law: str = option(
        "beta",
        "How the prefix ratio l is drawn, see above.",
        choices=("beta", "fixed", "binomial", "whole", "adaptive"),
    )
    shared: bool = option(False, "All prefixed rollouts of a prompt share one prefix (else each draws its own).")
    high: float = option(0.95, "Upper bound of the prefix ratio for `law=beta`.", low=0.0, high=1.0)
    beta_a: float = option(1.0, "alpha of the Beta position between low_t and high; 1 and 1 is uniform.", low=1e-6)
    beta_b: float = option(1.0, "beta of the Beta position between low_t and high; 1 and 1 is uniform.", low=1e-6)
    min_prefix_len: int = option(1, "Shortest prefix in tokens.", low=1)
    parts: int = option(5, "Equal parts of a demonstration for `law=binomial`.", low=1)
    at_steps: bool = option(
        False,
        "`law=binomial` counts the demonstration's own steps (`prefix.demonstrations.steps_column`), in at most as "
        "many parts as it has steps; demonstrations without steps are cut by tokens.",
    )
    adaptive_threshold: float = option(
        0.5, "Mean reward of a prompt's prefixed rollouts from which on `law=adaptive` shortens its prefix."
    )
    until: int | None = option(None, "Last training step with prefixes; plain rollouts after it. None: all steps.")


@dataclass
class GateConfig(Section):
    """Which rollouts of a prompt are trained on, by how many of its on-policy rollouts are correct.

    A prompt *fails* when at most `max_correct` of its on-policy rollouts have a reward above `correct_reward`. What the
    gate drops leaves the batch before any forward pass.
    """

    key = "prefix.gate"

    max_correct: int | None = option(
        None, "Correct on-policy rollouts of a failing prompt at most. None: no gate.", low=0
    )
    correct_reward: float = option(0.0, "A rollout is correct when its reward is above this.")
    demonstrations: str = option(
        "always",
        "Prompts whose prefixed rollouts stay: all, or only the `failing` ones.",
        choices=("always", "failing"),
    )
    on_policy: str = option(
        "always",
        "Prompts whose on-policy rollouts stay: all, or only the `passing` ones.",
        choices=("always", "passing"),
    )


@dataclass
class EntropyClipConfig(Section):
    """Which prefix tokens keep their advantage; the others get 0 (paper, Sec. 3.2)."""

    key = "prefix.entropy_clip"

    keep: str = option(
        "top",
        "`top`: the prefix tokens on which the old policy is least sure; `bottom` and `random`: ablations; `all`: off.",
        choices=("top", "bottom", "random", "all"),
    )
    share: float = option(
        0.2, "Share kept; exactly ceil(share * number of prefix tokens) tokens keep theirs.", low=0.0, high=1.0
    )
    pool: str = option(
        "batch",
        "Tokens that compete: all prefix tokens of the training batch, or those of one rollout.",
        choices=("batch", "sequence"),
    )


@dataclass
class AdvantageConfig(Section):
    """The baseline of estimator `prefix_rft`, and what happens to an advantage after the entropy clip."""

    key = "prefix.advantage"

    baseline: str = option(
        "group",
        "Rollouts whose mean reward is the baseline: the whole `group`, or its `on_policy` rollouts alone.",
        choices=("group", "on_policy"),
    )
    normalize_std: bool = option(
        False, "Divide by the standard deviation of the same rollouts plus 1e-6 (GRPO); False is Dr.GRPO."
    )
    on_policy: str = option(
        "estimator",
        "On-policy rollouts get the estimator's advantage, or (SRFT, with `loss.policy_ratio=log`) "
        "`likelihood_weight` * exp(H) where R > 0, H the mean entropy of the rollout's tokens, and -1 elsewhere.",
        choices=("estimator", "likelihood"),
    )
    likelihood_weight: float = option(0.1, "Factor of `on_policy=likelihood`.", low=0.0)
    prefix_transform: str = option(
        "none",
        "Applied to the prefix tokens' advantage: none, relu (max(A, 0)) or silu (A * sigmoid(A)).",
        choices=("none", "relu", "silu"),
    )
    prefix_weight: float = option(1.0, "Constant factor on the prefix tokens' advantage (ablation: 0.001).", low=0.0)
    position_weight: bool = option(
        False,
        "Divide a prefix token's advantage by the chance that a prefix reaches its position, normalised to mean 1 "
        "over the batch's prefix tokens.",
    )
    zero_truncated: bool = option(
        False, "Advantage 0 on the continuation of a prefixed rollout that hit the response limit."
    )


@dataclass
class LossConfig(Section):
    """The policy-loss form on prefix tokens and, where it differs from PPO with dual clip, on the policy's own."""

    key = "prefix.loss"

    update_prefix: bool = option(
        True, "False freezes the prefix: its tokens are context only and outside of every loss term."
    )
    prefix_ratio: str = option(
        "ppo",
        "What stands for the ratio on prefix tokens: `ppo` pi/pi_old, `p` the probability pi itself, "
        "`shaped` pi/(pi + gamma), `mis` 2 pi/(pi_old + (pi_old + 1)/2).",
        choices=("ppo", "p", "shaped", "mis"),
    )
    shaping_gamma: float = option(0.1, "gamma of `prefix_ratio=shaped`.", low=1e-8)
    prefix_old_log_prob: str = option(
        "old",
        "Denominator of the prefix tokens' PPO ratio: `old` the old policy, `current` sg(log pi), i.e. ratio 1.",
        choices=("old", "current"),
    )
    prefix_clip: str = option(
        "same",
        "PPO clipping on prefix tokens: `same` range as the actor's, `own` (`prefix_clip_low/high`) or `none`.",
        choices=("same", "own", "none"),
    )
    prefix_clip_low: float = option(0.2, "Lower epsilon on prefix tokens for `prefix_clip=own`.", low=0.0, high=1.0)
    prefix_clip_high: float = option(0.2, "Upper epsilon on prefix tokens for `prefix_clip=own`.", low=0.0)
    prefix_focus: float = option(
        0.0, "Prefix tokens' advantage times (1 - sg(pi))**prefix_focus (RL-PLUS: 0.5); 0 leaves it.", low=0.0
    )
    policy_ratio: str = option(
        "ppo",
        "On the policy's own tokens: `ppo` pi/pi_old, or `log` the log-likelihood, -A log pi, unclipped.",
        choices=("ppo", "log"),
    )
    policy_clip: str = option(
        "same",
        "PPO clipping on the policy's own tokens: the actor's (`same`) or `none` (LUFFY).",
        choices=("same", "none"),
    )
    entropy_bonus_on: str = option(
        "response",
        "Tokens of the entropy bonus (`actor.entropy_coeff`): the whole response, or the policy's own `continuation`.",
        choices=("response", "continuation"),
    )


@dataclass
class WeightScheduleConfig(ScheduleConfig):
    """mu_t, the weight of the SFT term at step t; 0 (the default) leaves the term out."""

    key = "prefix.sft.weight"

    kind: str = option(
        "constant",
        "Shape of the way from `initial` to `target`.",
        choices=("constant", "linear", "cosine", "stairs"),
    )
    initial: float = option(0.0, "Weight at the start.", low=0.0)
    target: float = option(0.0, "Weight after `steps` steps.", low=0.0)


@dataclass
class SFTConfig(Section):
    """The SFT term: mu_t * mean over the demonstration tokens of w * (-log pi), one global token mean per batch."""

    key = "prefix.sft"

    weight: WeightScheduleConfig = field(default_factory=WeightScheduleConfig)
    mix: str = option(
        "add",
        "`add`: policy loss + mu_t * SFT; `convex`: (1 - mu_t) * policy loss + mu_t * SFT (CHORD).",
        choices=("add", "convex"),
    )
    token_weight: str = option(
        "none",
        "w of a token: none (1), `p` sg(pi) (DFT), `p_1_p` sg(pi (1 - pi)) (CHORD-phi), `trust` in place "
        "of all that -pi / max(sg(pi), trust_floor) (TrSFT); or a registered one (docs/extending.md).",
    )
    row_weight: str = option(
        "none",
        "Weight of a demonstration: none (1), or `entropy` exp(entropy_sign * H) with H the old policy's mean entropy "
        "over its tokens (SRFT).",
        choices=("none", "entropy"),
    )
    entropy_sign: int = option(-1, "Sign in `row_weight=entropy`; the paper has -1, its code +1.", choices=(-1, 1))
    trust_floor: float = option(0.1, "Floor of `token_weight=trust`.", low=1e-6, high=1.0)


@dataclass
class MonitorConfig(Section):
    """What the run watches on your behalf."""

    key = "prefix.monitor"

    min_probs_correlation: float = option(
        0.9,
        "Warn when the correlation of rollout and actor probabilities on generated tokens falls under this.",
        low=-1.0,
        high=1.0,
    )
    rollout_log_steps: int | None = option(
        None,
        "Steps whose files stay in `trainer.rollout_data_dir`: as the run goes on, files of a lower number than its "
        "newest steps' are deleted, whichever run wrote them. None: all stay.",
        low=1,
    )


@dataclass
class PrefixConfig(Section):
    """The whole `prefix` section."""

    key = "prefix"

    preset: str = option("prefix_rft", "Name of the preset; only shown, never interpreted.")
    seed: int = option(0, "Seed of every random choice the plugin makes.", low=0)
    poll_interval: float = option(
        0.05, "Seconds between two looks of the trainer at finished rollouts (verl's own value is 2.0).", low=0.001
    )
    demonstrations: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    entropy_clip: EntropyClipConfig = field(default_factory=EntropyClipConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = self.schedule.initial, self.schedule.target
        if self.sampling.law == "beta" and max(bounds) > self.sampling.high:
            raise PrefixConfigError(
                "prefix.sampling.high",
                self.sampling.high,
                f"must not be below prefix.schedule.initial={self.schedule.initial} or target={self.schedule.target}.",
            )

    @classmethod
    def of(cls, section: DictConfig | dict | PrefixConfig | None) -> PrefixConfig:
        """Typed config from a `prefix` section (None: the defaults).

        Raises:
            PrefixConfigError: unknown key, wrong type or a value out of range.
        """
        if isinstance(section, PrefixConfig):
            return section
        try:
            if isinstance(
                section, DictConfig
            ):  # a preset may refer to verl's keys, which only the section's parent knows
                section = OmegaConf.to_container(section, resolve=True)
            merged = OmegaConf.merge(OmegaConf.structured(cls), section or {})
            return OmegaConf.to_object(merged)  # type: ignore[return-value]
        except PrefixConfigError:
            raise
        except Exception as error:  # OmegaConf's own errors name key and type; keep them as the mend
            raise PrefixConfigError("prefix", section, f"cannot be read: {error}") from error
