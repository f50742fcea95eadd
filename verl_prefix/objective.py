"""The objective per token: one form for SFT and RL, of which every preset is a point (docs/methods.md).

    loss = agg_i,t [ L_policy(i, t) ]  +  mu_t * mean_demonstration tokens [ w * (-log pi) ]

The first sum runs over the response tokens that the mask keeps, aggregated by verl (`actor.loss_agg_mode`); the
second over demonstration tokens, as one global token mean. Prefix-RFT (arXiv 2507.01679, Sec. 3.2) is mu = 0 and
PPO's clipped surrogate with dual clip (arXiv 1912.09729) on prefix and continuation alike.

What is fixed per rollout is decided on the driver and arrives in the inputs: gates and (1 - mu) in the advantages,
mu in the rows' SFT weights. Here is only what depends on the current policy.

Tensor names carry their dimensions: B rows (rollouts), R rows with
demonstration tokens, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from verl_prefix.config import LossConfig, SFTConfig

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

    The policy's own tokens differ where `config` says so:

    - `policy_clip=none`: -r A, neither clip nor dual clip (LUFFY, arXiv 2504.14945).
    - `policy_ratio=log`: -A log pi (SRFT, arXiv 2506.19767, Eq. for self-exploration).

    And so do prefix tokens:

    - `prefix_old_log_prob=current`: r = exp(log pi - sg(log pi)), which is 1 with the gradient of log pi.
    - `prefix_clip=own`: `prefix_clip_low/high` in place of `clip_low/high`; the dual clip stays.
    - `prefix_clip=none`: -r A, neither clip nor dual clip.
    - `prefix_ratio=p`: -pi A; `shaped`: -pi / (pi + gamma) A (LUFFY); `mis`: -2 pi / (pi_old + (pi_old + 1) / 2) A
      (RL-PLUS). None of them is clipped, and `prefix_old_log_prob` and `prefix_clip` have no effect on them.
    - `prefix_focus` = f: A times (1 - sg(pi))**f (RL-PLUS), in every form.

    `update_prefix=False` is a matter of masks and changes nothing here.

    Args:
        log_prob_BT: log pi of the response tokens in nats, with gradient.
        old_log_prob_BT: log pi_old.
        advantages_BT: A.
        prefix_mask_BT: bool, the response tokens that come from a demonstration.
        config: the forms.
        clip_low: lower epsilon of the actor.
        clip_high: upper epsilon of the actor.
        clip_c: c of the dual clip, above 1.
    """
    old_log_prob_BT, advantages_BT = old_log_prob_BT.detach(), advantages_BT.detach()
    special = config.prefix_focus > 0 or config.prefix_ratio != "ppo"
    # Few rows have a prefix, so what applies to prefixes alone is computed on those.
    row_R = prefix_mask_BT.any(dim=1).nonzero().squeeze(1) if special else None
    if config.prefix_focus > 0:
        focus_RT = (1 - log_prob_BT.detach()[row_R].exp()).clamp(min=0) ** config.prefix_focus
        focused_RT = torch.where(prefix_mask_BT[row_R], advantages_BT[row_R] * focus_RT, advantages_BT[row_R])
        advantages_BT = advantages_BT.index_copy(0, row_R, focused_RT)
    log_ratio_BT = (log_prob_BT - old_log_prob_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    drift_BT = log_ratio_BT.detach()
    if config.prefix_old_log_prob == "current" and config.prefix_ratio == "ppo":
        log_ratio_BT = torch.where(prefix_mask_BT, log_prob_BT - log_prob_BT.detach(), log_ratio_BT)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT

    own_clipped = config.policy_ratio == "ppo" and config.policy_clip == "same"
    prefix_clipped = config.prefix_ratio == "ppo" and config.prefix_clip != "none"
    loss_BT, clipped_BT, dual_clipped_BT = plain_BT, torch.zeros_like(prefix_mask_BT), torch.zeros_like(prefix_mask_BT)
    if own_clipped or prefix_clipped:
        lower, upper = _clip_range(prefix_mask_BT, log_prob_BT, config, clip_low, clip_high)
        loss_BT, clipped_BT, dual_clipped_BT = _dual_clip(ratio_BT, plain_BT, advantages_BT, lower, upper, clip_c)
    if own_clipped != prefix_clipped:
        kind_BT = prefix_mask_BT if prefix_clipped else ~prefix_mask_BT
        loss_BT = torch.where(kind_BT, loss_BT, plain_BT)
        clipped_BT, dual_clipped_BT = clipped_BT & kind_BT, dual_clipped_BT & kind_BT
    if config.policy_ratio == "log":
        loss_BT = torch.where(prefix_mask_BT, loss_BT, -advantages_BT * log_prob_BT)
    if config.prefix_ratio != "ppo":
        prefix_RT = -advantages_BT[row_R] * _prefix_ratio(log_prob_BT[row_R], old_log_prob_BT[row_R], config)
        loss_BT = loss_BT.index_copy(0, row_R, torch.where(prefix_mask_BT[row_R], prefix_RT, loss_BT[row_R]))
    return TokenLoss(loss_BT, clipped_BT, dual_clipped_BT, drift_BT)


#: `prefix.sft.token_weight` -> (log_prob_RT, entropy_RT or None, config) -> loss of every token (R, T), with gradient
TOKEN_WEIGHTS: dict[str, Callable[[Tensor, Tensor | None, SFTConfig], Tensor]] = {}


def token_weight(name: str):
    """Register a form of the SFT term as `prefix.sft.token_weight=NAME` (docs/extending.md)."""

    def register(form: Callable[[Tensor, Tensor | None, SFTConfig], Tensor]):
        TOKEN_WEIGHTS[name] = form
        return form

    return register


@token_weight("none")
def _plain(log_prob_RT: Tensor, entropy_RT: Tensor | None, config: SFTConfig) -> Tensor:
    """-log p."""
    return -log_prob_RT


@token_weight("p")
def _dft(log_prob_RT: Tensor, entropy_RT: Tensor | None, config: SFTConfig) -> Tensor:
    """-sg(p) log p: DFT, arXiv 2508.05629."""
    return -log_prob_RT.detach().exp() * log_prob_RT


@token_weight("p_1_p")
def _chord(log_prob_RT: Tensor, entropy_RT: Tensor | None, config: SFTConfig) -> Tensor:
    """-sg(p (1 - p)) log p: CHORD-phi, arXiv 2508.11408."""
    p_RT = log_prob_RT.detach().exp()
    return -p_RT * (1 - p_RT) * log_prob_RT


@token_weight("trust")
def _trsft(log_prob_RT: Tensor, entropy_RT: Tensor | None, config: SFTConfig) -> Tensor:
    """-p / max(sg(p), floor), whose gradient is -(1 / max(p, floor)) grad p: TrSFT of TRAPO, arXiv 2512.17636."""
    p_RT = log_prob_RT.exp()
    return -p_RT / p_RT.detach().clamp(min=config.trust_floor)


def demonstration_nll(
    log_prob_RT: Tensor,
    prefix_mask_RT: Tensor,
    row_weight_R: Tensor,
    *,
    config: SFTConfig,
    entropy_RT: Tensor | None = None,
) -> Tensor:
    """The SFT term, summed: sum over demonstration tokens of row_weight * w * (-log p); a scalar with gradient.

    `row_weight_R` carries mu_t over the number of demonstration tokens, so the sum over all micro-batches and workers
    is mu_t times the global token mean, however the rows are packed. An empty set of rows gives 0 that can still be
    back-propagated.

    Args:
        log_prob_RT: log p, with gradient.
        prefix_mask_RT: bool, demonstration tokens, whether or not the policy loss trains on them.
        row_weight_R: weight of each row.
        config: which form of `TOKEN_WEIGHTS`.
        entropy_RT: entropy of the old policy in nats.
    """
    loss_RT = TOKEN_WEIGHTS[config.token_weight](log_prob_RT, entropy_RT, config)
    return (torch.where(prefix_mask_RT, loss_RT, 0.0) * row_weight_R[:, None]).sum()


def _clip_range(prefix_BT: Tensor, like_BT: Tensor, config: LossConfig, low: float, high: float):
    """Bounds of the ratio: two numbers, or two tensors where prefix tokens have a range of their own."""
    own = (config.prefix_clip_low, config.prefix_clip_high)
    if config.prefix_clip != "own" or config.prefix_ratio != "ppo" or own == (low, high):
        return 1 - low, 1 + high
    bounds = ((1 - low, 1 - own[0]), (1 + high, 1 + own[1]))
    return tuple(torch.full_like(like_BT, policy).masked_fill_(prefix_BT, prefix) for policy, prefix in bounds)


def _dual_clip(ratio_BT: Tensor, plain_BT: Tensor, advantages_BT: Tensor, lower, upper, c: float):
    """PPO's clipped surrogate, capped at -c A where A < 0. Returns loss, clipped and dual-clipped tokens."""
    bounded_BT = -advantages_BT * ratio_BT.clamp(lower, upper)
    clipped_BT = bounded_BT > plain_BT
    loss_BT = torch.maximum(plain_BT, bounded_BT)
    cap_BT = -c * advantages_BT
    dual_clipped_BT = (advantages_BT < 0) & (loss_BT > cap_BT)
    return torch.where(dual_clipped_BT, cap_BT, loss_BT), clipped_BT, dual_clipped_BT


def _prefix_ratio(log_prob_RT: Tensor, old_log_prob_RT: Tensor, config: LossConfig) -> Tensor:
    """What stands for pi / pi_old on prefix tokens."""
    p_RT = log_prob_RT.exp()
    if config.prefix_ratio == "shaped":
        return p_RT / (p_RT + config.shaping_gamma)
    if config.prefix_ratio == "mis":
        return 2 * p_RT / (1.5 * old_log_prob_RT.exp() + 0.5)
    return p_RT
