"""Seam: the objective of `verl_prefix.objective` as verl's policy loss.

`worker_loss` is set on the workers as the whole loss function. It hands the batch's prefix lengths to `policy_loss`,
which verl's own `ppo_loss` then calls under the name `prefix_rft`; aggregation, entropy bonus and KL are verl's.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict

from verl_prefix import columns
from verl_prefix.advantage import prefix_mask
from verl_prefix.config import PrefixConfig
from verl_prefix.names import LOSS_MODE
from verl_prefix.objective import token_policy_loss


def worker_loss(config, model_output: dict, data: TensorDict, dp_group=None, *, prefix: PrefixConfig):
    """verl loss function (`set_loss_fn`): one micro-batch's loss and metrics.

    Args:
        config: verl's ActorConfig.
        model_output: `log_probs` and, if asked for, `entropy`; nested, one entry per token of the sequence.
        data: every column of the micro-batch, among them `prefix_len` (B,) int64.
        prefix: the run's `prefix` section.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss

    if prefix.loss.entropy_bonus_on == "continuation" and model_output.get("entropy") is not None:
        model_output = {**model_output, "entropy": _without_prefix(model_output["entropy"], data)}
    with columns.lend(prefix_len=data["prefix_len"], prefix=prefix) as lent:
        loss, metrics = ppo_loss(config, model_output, data, dp_group=dp_group)
    # Shares of the whole mini-batch's tokens: the sum over micro-batches does not depend on how they were packed.
    tokens = data["batch_num_tokens"] / data["dp_size"]
    for name, count in lent.get("token_counts", {}).items():
        metrics[f"prefix/{name}"] = Metric(value=count / tokens, aggregation=AggregationType.SUM)
    return loss, metrics


def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl policy loss `prefix_rft`: the objective on every token, aggregated by verl's `agg_loss`.

    All tensors are (B, T). Returns the scalar loss and verl's usual PPO metrics.
    """
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.torch_functional import masked_mean

    lent = columns.borrowed(f"actor.policy_loss.loss_mode={LOSS_MODE}")
    prefix: PrefixConfig = lent["prefix"]
    mask_BT = prefix_mask(lent["prefix_len"].to(response_mask.device), response_mask)
    clip_low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    clip_high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    tokens = token_policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask_BT,
        config=prefix.loss,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_c=config.get("clip_ratio_c", 3.0),
    )
    loss_BT = tokens.loss_BT if rollout_is_weights is None else tokens.loss_BT * rollout_is_weights
    loss = agg_loss(loss_mat=loss_BT, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)

    counted = response_mask.bool()
    clipped = (tokens.clipped_BT | tokens.dual_clipped_BT) & counted
    lent["token_counts"] = {
        "clipped_prefix_tokens": (clipped & mask_BT).sum(),
        "clipped_policy_tokens": (clipped & ~mask_BT).sum(),
    }
    metrics = {
        "actor/pg_clipfrac": masked_mean(tokens.clipped_BT.float(), response_mask).item(),
        "actor/ppo_kl": masked_mean(-tokens.log_ratio_BT, response_mask).item(),
        "actor/pg_clipfrac_lower": masked_mean(tokens.dual_clipped_BT.float(), response_mask).item(),
    }
    return loss, metrics


def _without_prefix(entropy: torch.Tensor, data: TensorDict) -> torch.Tensor:
    """`entropy` with 0 where it predicts a prefix token (nested (B, prompt+response); entry t predicts token t+1)."""
    prompt_len, length = data["prompts"].offsets().diff(), data["input_ids"].offsets().diff()
    starts = data["input_ids"].offsets()[:-1]
    values = entropy.values() if entropy.is_nested else entropy
    position = torch.arange(values.shape[0], device=values.device) - torch.repeat_interleave(starts, length)
    first = torch.repeat_interleave(prompt_len, length)
    last = torch.repeat_interleave(prompt_len + data["prefix_len"].to(prompt_len.device), length)
    keep = ~((position + 1 >= first) & (position + 1 < last))
    masked = values * keep.to(values.dtype)
    return torch.nested.nested_tensor_from_jagged(masked, offsets=entropy.offsets()) if entropy.is_nested else masked
