"""From rewards to the advantages that the loss sees: estimator, entropy clip, reshaping, share of the policy term."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_prefix.advantage import entropy_clip_mask, likelihood_advantages, prefix_mask, shape_advantages
from verl_prefix.config import PrefixConfig
from verl_prefix.schedule import value_at


class Credit(NamedTuple):
    """Attributes:
    advantages: (B, T), what the policy loss gets.
    returns: (B, T), as the estimator gave them.
    clip_kept: (N,) bool, one entry per prefix token: the entropy clip let it keep its advantage.
    """

    advantages: Tensor
    returns: Tensor
    clip_kept: Tensor


def row_order(row_index: Sequence[int | str], session: Sequence[int]) -> Tensor:
    """(B,) the batch's rows by training row and rollout, whatever order they came back in and workers were given."""
    return torch.tensor(sorted(range(len(session)), key=lambda row: (str(row_index[row]), session[row])))


def assign(
    estimator: Callable[..., tuple[Tensor, Tensor]],
    *,
    config: PrefixConfig,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    entropy: Tensor,
    rows: Mapping[str, Tensor],
    global_step: int,
    order: Tensor | None = None,
) -> Credit:
    """Advantages of one training batch.

    Args:
        estimator: one of `verl_prefix.advantage.ESTIMATORS`.
        config: the `prefix` section.
        token_level_rewards: (B, T).
        response_mask: (B, T).
        index: (B,) prompt of each rollout.
        entropy: (B, T) of the old policy in nats.
        rows: per-row columns (B,) `prefix_len`, `demo_len`, `low`, `high`, `hit_limit`.
        global_step: training step.
        order: (B,) `row_order`, in which the entropy clip draws at random and breaks ties; None: as the rows stand.
    """
    prefix_len = rows["prefix_len"]
    advantages, returns = estimator(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        prefix_len=prefix_len,
        config=config,
    )
    # The estimator would clip as well, given the entropy; the mask is also a metric, and is computed once.
    is_prefix = prefix_mask(prefix_len, response_mask)
    order = torch.arange(len(prefix_len)) if order is None else order
    prefixed = order[prefix_len.cpu()[order] > 0].to(is_prefix.device)
    kept = torch.ones_like(is_prefix)
    kept[prefixed] = entropy_clip_mask(
        entropy[prefixed], is_prefix[prefixed], config.entropy_clip, seed=config.seed, global_step=global_step
    )
    advantages = shape_advantages(
        advantages.masked_fill(~kept, 0.0),
        prefix_len=prefix_len,
        response_mask=response_mask,
        config=config.advantage,
        demo_len=rows["demo_len"],
        low=rows["low"],
        high=rows["high"],
        truncated=rows["hit_limit"],
    )
    if config.advantage.on_policy == "likelihood":
        advantages = likelihood_advantages(
            advantages,
            reward=token_level_rewards.sum(-1),
            entropy=entropy,
            prefix_len=prefix_len,
            response_mask=response_mask,
            weight=config.advantage.likelihood_weight,
        )
    if config.sft.mix == "convex":
        advantages = advantages * (1 - value_at(config.sft.weight, global_step))
    return Credit(advantages, returns, kept[is_prefix])
