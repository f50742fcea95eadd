"""The plugin's metrics: prefixed against on-policy rollouts, one line each in `DESCRIPTIONS` (`docs/metrics.md`).

verl aggregates metrics by substrings of their names (max, min, sum, total, mean, ...; see `MetricsAggregator`), so a
name contains one of those only where it means it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verl_prefix.faults import warn

CORRELATION = "training/rollout_actor_probs_pearson_corr"
DIFFERENCE = "training/rollout_probs_diff_mean"

#: what is measured on prefixed and on on-policy rollouts alike, suffix -> meaning
_SIDES = {
    "reward": "mean reward of the rollouts that are trained on",
    "advantage": "mean advantage over the tokens the policy generated",
    "entropy": "mean old-policy entropy over the tokens the policy generated, in nats",
    "response_len": "mean response length in tokens, prefix included",
    "truncated": "share of rollouts that hit the response limit without an EOS",
    "clipfrac": "share of the tokens the policy generated on which the PPO clip was active",
}

DESCRIPTIONS: dict[str, str] = {
    "prefix/rollout_share": "share of the batch's rollouts that have a prefix",
    "prefix/token_share": "share of the batch's response tokens that are prefix tokens",
    "prefix/generated_tokens": "tokens that the policy generated, in the rollouts that are trained on",
    "prefix/low": "lower bound low_t of the prefix ratio (at the step of issue), mean over prefixed rollouts",
    "prefix/high": "upper bound of the prefix ratio",
    "prefix/ratio/mean": "mean ratio of prefix length to demonstration length",
    "prefix/len/mean": "mean prefix length in tokens",
    "prefix/len/max": "longest prefix in tokens",
    "prefix/len/min": "shortest prefix in tokens",
    "prefix/prefix_advantage": "mean advantage over prefix tokens, after the entropy clip",
    "prefix/prefix_entropy": "mean old-policy entropy over prefix tokens, in nats",
    "prefix/entropy_clip_kept": "share of prefix tokens that the entropy clip lets keep their advantage",
    "prefix/updated_share": "share of prefix tokens whose advantage is not 0",
    "prefix/clipfrac": "share of prefix tokens on which the PPO clip was active",
    "prefix/groups_without_signal": "share of groups in which every rollout that is trained on got the same reward",
    "prefix/evicted_groups": "groups of the batch of which no rollout came back",
    "prefix/missing_rollouts": "rollouts of the batch that failed and did not come back",
    "prefix/no_demonstration": "rollouts that were to have a prefix and got none: no usable demonstration in their row",
    "prefix/rollout_log_lost": "lines that the logs of rollouts have lost so far to a full disk (with such a log only)",
    "prefix/metrics_log_lost": "lines that the `file` logger has lost so far to a full disk (with that logger only)",
    "actor/update_skipped": "1 where a mini-batch's update was skipped, its gradient norm being NaN or infinite",
    "gate/failing_share": "share of prompts with too few correct on-policy rollouts (with a gate only)",
    "gate/dropped_rollouts": "rollouts that the gate took out of the batch (with a gate only)",
    "gate/dropped_tokens": "tokens that the policy had generated in those rollouts (with a gate only)",
    "sft/weight": "mu_t, the weight of the SFT term at this step (with an SFT term only)",
    "actor/sft_loss": "mu_t times the mean of the SFT term over demonstration tokens (with an SFT term only)",
    **{f"prefixed/{name}": f"{text}; prefixed rollouts" for name, text in _SIDES.items()},
    **{f"on_policy/{name}": f"{text}; rollouts without a prefix" for name, text in _SIDES.items()},
}


def prefix_metrics(
    *,
    reward: torch.Tensor,
    advantages: torch.Tensor,
    entropy: torch.Tensor,
    response_mask: torch.Tensor,
    response_len: torch.Tensor,
    group: np.ndarray,
    rows: dict[str, Any],
    expected_groups: int,
    rollouts_per_group: int,
    dropped_rollouts: int = 0,
) -> dict[str, float]:
    """Metrics of one training batch, before the update.

    Args:
        reward, response_len, group: (B,). advantages, entropy, response_mask: (B, T).
        rows: per-row columns (B,) `prefix_len`, `real`, `low`, `high`, `ratio`, `demo_len`, `hit_limit`,
            `no_demonstration`; and `clip_kept`, one entry per prefix token.
        expected_groups, rollouts_per_group: what the step asked for.
        dropped_rollouts: what the gate took out.

    Returns:
        name -> value. A measure of an empty set of rows or tokens is left out rather than made up.
    """
    real = rows["real"]
    prefix_len = rows["prefix_len"]
    prefixed = real & (prefix_len > 0)
    on_policy = real & (prefix_len == 0)
    valid = response_mask.bool() & real[:, None]
    positions = torch.arange(response_mask.shape[1])
    # A frozen prefix is outside the response mask, but still part of the response.
    in_prefix = (positions < prefix_len[:, None]) & (positions < response_len[:, None]) & real[:, None]
    own = valid & ~in_prefix

    out: dict[str, float] = {}

    def put(name: str, values: torch.Tensor, reduce=torch.mean) -> None:
        if values.numel():
            out[name] = float(reduce(values.double()))

    def put_mean(name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        total, count = _sum_and_count(values, where)
        if count:
            out[name] = total / count

    put("prefix/rollout_share", prefixed[real])
    put_mean("prefix/token_share", in_prefix, valid | in_prefix)
    put("prefix/generated_tokens", (response_len - prefix_len)[real], torch.sum)
    for name in ("low", "high"):
        put(f"prefix/{name}", rows[name][prefixed])
    put("prefix/ratio/mean", rows["ratio"][prefixed])
    for name, reduce in (("mean", torch.mean), ("max", torch.max), ("min", torch.min)):
        put(f"prefix/len/{name}", prefix_len[prefixed], reduce)
    put("prefix/no_demonstration", rows["no_demonstration"][real], torch.sum)
    put_mean("prefix/prefix_advantage", advantages, in_prefix)
    put_mean("prefix/prefix_entropy", entropy, in_prefix)
    put("prefix/entropy_clip_kept", rows["clip_kept"])
    put_mean("prefix/updated_share", advantages != 0, in_prefix)
    for side, chosen in (("prefixed", prefixed), ("on_policy", on_policy)):
        put(f"{side}/reward", reward[chosen])
        put(f"{side}/response_len", response_len[chosen])
        put(f"{side}/truncated", rows["hit_limit"][chosen])
        put_mean(f"{side}/advantage", advantages, own & chosen[:, None])
        put_mean(f"{side}/entropy", entropy, own & chosen[:, None])

    out.update(_group_metrics(reward[real], group[real.numpy()], expected_groups, rollouts_per_group))
    out["prefix/missing_rollouts"] = max(out["prefix/missing_rollouts"] - dropped_rollouts, 0.0)
    return out


def _sum_and_count(values_BT: torch.Tensor, where_BT: torch.Tensor) -> tuple[float, int]:
    """Of the values under a mask. In blocks of rows: to pick one takes an index of 16 bytes, and 8 more in float64."""
    total, count = 0.0, 0
    for values_RT, where_RT in zip(values_BT.split(64), where_BT.split(64), strict=True):
        picked_N = values_RT[where_RT]
        total, count = total + float(picked_N.double().sum()), count + picked_N.numel()
    return total, count


def clip_fractions(actor_metrics: dict[str, Any]) -> dict[str, float]:
    """Clip fractions after the update. The loss's token counts are taken out of `actor_metrics` (in place)."""
    fractions = {}
    for kind in ("prefix", "prefixed", "on_policy"):
        tokens, clipped = (actor_metrics.pop(f"actor/prefix/{kind}_{what}", 0) for what in ("tokens", "clipped"))
        if tokens > 0:
            fractions[f"{kind}/clipfrac"] = float(clipped) / float(tokens)
    return fractions


def grader_metrics(reward_info: Sequence[Mapping[str, Any]], real: Sequence[bool]) -> dict[str, float]:
    """Means of what a reward function reports beside its score under names that start with `grader_`
    (`verl_prefix.reward`: timeouts, unparsable answers, ...), as `reward/grader_*`.

    Args:
        reward_info: (B,) what the reward function returned beside the score.
        real: (B,) False on synthetic padding rows.
    """
    counts: dict[str, list[float]] = {}
    for info, counted in zip(reward_info, real, strict=True):
        for name, value in info.items():
            if counted and name.startswith("grader_"):
                counts.setdefault(f"reward/{name}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in counts.items()}


def _group_metrics(
    reward: torch.Tensor, group: np.ndarray, expected_groups: int, rollouts_per_group: int
) -> dict[str, float]:
    _, members = np.unique(group.astype(str), return_inverse=True)
    count = int(members.max()) + 1 if len(members) else 0
    highest, lowest = np.full(count, -np.inf), np.full(count, np.inf)
    np.maximum.at(highest, members, reward.numpy())
    np.minimum.at(lowest, members, reward.numpy())
    out = {
        "prefix/evicted_groups": float(max(expected_groups - count, 0)),
        "prefix/missing_rollouts": float(max(expected_groups * rollouts_per_group - len(members), 0)),
    }
    if count:
        out["prefix/groups_without_signal"] = float(np.mean(highest == lowest))
    return out


class CorrelationWatch:
    """Warns when rollout and actor disagree on the probabilities of generated tokens.

    Usual causes: weights did not reach the rollout engine, a tokenizer or template that differs between the two, or a
    precision gap. Training runs on without a complaint otherwise.
    """

    def __init__(self, threshold: float, repeat_every: int = 50):
        self.threshold, self.repeat_every = threshold, repeat_every
        self._last_warned: int | None = None

    def check(self, step_metrics: dict[str, Any], step: int) -> bool:
        """True if this step's correlation is under the threshold (warns at most every `repeat_every` steps)."""
        value = step_metrics.get(CORRELATION)
        # A constant distribution on either side has no correlation (NaN): uniform rollouts, or a policy that is certain
        # of everything. Only the first is far from the other side.
        undefined = value is not None and not np.isfinite(value)
        if value is None or (undefined and not step_metrics.get(DIFFERENCE, 0.0) > 0.1):
            return False
        if not undefined and float(value) >= self.threshold:
            return False
        if self._last_warned is None or step - self._last_warned >= self.repeat_every:
            self._last_warned = step
            message = (
                f"step {step}: rollout and actor probabilities correlate at {float(value):.3f}, below "
                f"prefix.monitor.min_probs_correlation={self.threshold}. The rollout engine does not sample from the "
                "policy that is trained: check the weight synchronisation (tied embeddings on the CPU engine?), the "
                "rollout's dtype and that both load the same tokenizer. Under prefix_colocate_async the batch may be "
                "too old instead: training/off_policy/trajectory_staleness/max."
            )
            warn(message)
        return True
