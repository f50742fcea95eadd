"""The policy loss per token (arXiv 2507.01679, Sec. 3.2, and the ablations of its authors' code).

Continuation tokens get PPO's clipped surrogate with dual clip (arXiv 1912.09729). Prefix tokens get the same by
default; `LossConfig` replaces their ratio, their old policy or their clip range.

Tensor names carry their dimensions: B rows (rollouts), T response positions. Nothing here masks or aggregates: that is
the job of the caller, who knows the normaliser.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from verl_prefix.config import LossConfig

MAX_LOG_RATIO = 20.0  # keeps exp() finite in float32; verl clamps to the same


class TokenLoss(NamedTuple):
    """The loss of every token, and what clipped it. All (B, T); values outside of the response mean nothing.

    Attributes:
        loss_BT: to be minimised; neither masked nor aggregated.
        clipped_BT: bool, the clipped branch is the strictly larger loss (so the token has no gradient).
        dual_clipped_BT: bool, the dual clip caps the loss of a negative advantage (no gradient either).
        log_ratio_BT: log(pi / pi_old) in nats, clamped to +-20, detached; against the given old policy in every mode,
            so it measures drift even where the loss uses another ratio.
    """

    loss_BT: Tensor
    clipped_BT: Tensor
    dual_clipped_BT: Tensor
    log_ratio_BT: Tensor


def token_policy_loss(
    log_prob_BT: Tensor,
    old_log_prob_BT: Tensor,
    advantages_BT: Tensor,
    prefix_mask_BT: Tensor,
    *,
    config: LossConfig,
    clip_low: float,
    clip_high: float,
    clip_c: float,
) -> TokenLoss:
    """The policy loss of every token; gradients flow through `log_prob_BT` only.

    With r = pi / pi_old, the loss of a token is

        max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), and for A < 0 at most -clip_c A.

    Prefix tokens differ where `config` says so:

    - `prefix_old_log_prob=current`: r = exp(log pi - sg(log pi)), which is 1 with the gradient of log pi.
    - `prefix_clip=own`: `prefix_clip_low/high` in place of `clip_low/high`; the dual clip stays.
    - `prefix_clip=none`: -r A, neither clip nor dual clip.
    - `prefix_ratio=p`: -pi A; `shaped`: -pi / (pi + gamma) A. Neither is a ratio of policies, so clipping is not
      defined on them and old policy and `prefix_clip` have no effect.

    `update_prefix=False` is a matter of masks and changes nothing here.

    Args:
        log_prob_BT: log pi of the response tokens in nats, with gradient.
        old_log_prob_BT: log pi_old.
        advantages_BT: A.
        prefix_mask_BT: bool, the response tokens that come from a demonstration.
        config: the form on prefix tokens.
        clip_low: lower epsilon of the actor.
        clip_high: upper epsilon of the actor.
        clip_c: c of the dual clip, above 1.
    """
    old_log_prob_BT, advantages_BT = old_log_prob_BT.detach(), advantages_BT.detach()
    log_ratio_BT = (log_prob_BT - old_log_prob_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    drift_BT = log_ratio_BT.detach()

    special = config.prefix_ratio != "ppo"  # the prefix tokens do not use a ratio of policies
    if config.prefix_old_log_prob == "current" and not special:
        log_ratio_BT = torch.where(prefix_mask_BT, log_prob_BT - log_prob_BT.detach(), log_ratio_BT)
    lower, upper = 1 - clip_low, 1 + clip_high
    own_range = (config.prefix_clip_low, config.prefix_clip_high)
    if config.prefix_clip == "own" and not special and own_range != (clip_low, clip_high):
        lower = torch.full_like(log_prob_BT, lower).masked_fill_(prefix_mask_BT, 1 - own_range[0])
        upper = torch.full_like(log_prob_BT, upper).masked_fill_(prefix_mask_BT, 1 + own_range[1])

    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    bounded_BT = -advantages_BT * ratio_BT.clamp(lower, upper)
    clipped_BT = bounded_BT > plain_BT
    loss_BT = torch.maximum(plain_BT, bounded_BT)
    cap_BT = -clip_c * advantages_BT
    dual_clipped_BT = (advantages_BT < 0) & (loss_BT > cap_BT)
    loss_BT = torch.where(dual_clipped_BT, cap_BT, loss_BT)

    if special or config.prefix_clip == "none":
        loss_BT = torch.where(prefix_mask_BT, _unclipped(log_prob_BT, plain_BT, advantages_BT, config), loss_BT)
        clipped_BT, dual_clipped_BT = clipped_BT & ~prefix_mask_BT, dual_clipped_BT & ~prefix_mask_BT
    return TokenLoss(loss_BT, clipped_BT, dual_clipped_BT, drift_BT)


def _unclipped(log_prob_BT: Tensor, plain_BT: Tensor, advantages_BT: Tensor, config: LossConfig) -> Tensor:
    """The loss of a prefix token that no clip applies to."""
    if config.prefix_ratio == "ppo":
        return plain_BT
    p_BT = log_prob_BT.exp()
    return -advantages_BT * (p_BT if config.prefix_ratio == "p" else p_BT / (p_BT + config.shaping_gamma))
