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
from verl_prefix.objective import demonstration_nll, token_policy_loss

#: per-row column that the trainer adds when the objective has an SFT term
SFT_WEIGHT = "sft_weight"


def worker_loss(config, model_output: dict, data: TensorDict, dp_group=None, *, prefix: PrefixConfig):
    """verl loss function (`set_loss_fn`): one micro-batch's loss and metrics.

    Args:
        config: verl's ActorConfig.
        model_output: `log_probs` and, if asked for, `entropy`; nested, one entry per token of the sequence.
        data: every column of the micro-batch, among them `prefix_len` (B,) int64, and `sft_weight` (B,) where the
            objective has an SFT term.
        prefix: the run's `prefix` section.
    """
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss

    if prefix.loss.entropy_bonus_on == "continuation" and model_output.get("entropy") is not None:
        model_output = {**model_output, "entropy": _without_prefix(model_output["entropy"], data)}
    if not data["batch_num_tokens"]:
        # No token of this mini-batch is in the policy term (demonstrations outside of it, after a gate): verl's token
        # mean would divide by 0, and the SFT term be lost with it.
        tu.assign_non_tensor(data, batch_num_tokens=1)
    rows = {"prefix_len": data["prefix_len"], "prefix": prefix}
    if SFT_WEIGHT in data:
        rows |= {SFT_WEIGHT: data[SFT_WEIGHT], "entropy": data["entropy"]}
    with columns.lend(**rows) as lent:
        loss, metrics = ppo_loss(config, model_output, data, dp_group=dp_group)
    if "sft_loss" in lent:
        sft_loss = lent["sft_loss"] * data["dp_size"]  # as in agg_loss: verl averages gradients over the workers
        loss = loss + sft_loss
        metrics["sft_loss"] = Metric(value=sft_loss.detach(), aggregation=AggregationType.SUM)
    # Counts, not shares: a sum over micro-batches does not depend on how they were packed.
    for name, count in lent.get("token_counts", {}).items():
        metrics[f"prefix/{name}"] = Metric(value=count, aggregation=AggregationType.SUM)
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
    if SFT_WEIGHT in lent:
        lent["sft_loss"] = _sft_loss(log_prob, lent)
    loss_BT = tokens.loss_BT if rollout_is_weights is None else tokens.loss_BT * rollout_is_weights
    loss = agg_loss(loss_mat=loss_BT, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)

    lent["token_counts"] = _token_counts(
        tokens.clipped_BT | tokens.dual_clipped_BT, mask_BT, response_mask, lent["prefix_len"] > 0
    )
    metrics = {
        "actor/pg_clipfrac": masked_mean(tokens.clipped_BT.float(), response_mask).item(),
        "actor/ppo_kl": masked_mean(-tokens.log_ratio_BT, response_mask).item(),
        "actor/pg_clipfrac_lower": masked_mean(tokens.dual_clipped_BT.float(), response_mask).item(),
    }
    return loss, metrics


def _sft_loss(log_prob: torch.Tensor, lent: dict[str, Any]) -> torch.Tensor:
    """The micro-batch's share of the SFT term, on the rows that have one."""
    weight_B, prefix_len_B = (lent[name].to(log_prob.device) for name in (SFT_WEIGHT, "prefix_len"))
    config: PrefixConfig = lent["prefix"]
    row_R = (weight_B > 0).nonzero().squeeze(1)
    log_prob_RT = log_prob[row_R]
    # The prefix may be outside of the response mask, so its own length decides. Padding rows have weight 0.
    mask_RT = torch.arange(log_prob.shape[1], device=log_prob.device) < prefix_len_B[row_R, None]
    entropy_RT = lent["entropy"].to_padded_tensor(0.0, log_prob.shape).to(log_prob.device)[row_R]
    return demonstration_nll(log_prob_RT, mask_RT, weight_B[row_R], config=config.sft, entropy_RT=entropy_RT)


def _token_counts(
    clipped_BT: torch.Tensor, prefix_BT: torch.Tensor, response_mask: torch.Tensor, prefixed_B: torch.Tensor
) -> dict[str, Any]:
    """Tokens, and clipped ones among them, of the three kinds whose clip fraction is reported."""
    own_BT = response_mask.bool() & ~prefix_BT
    prefixed_B1 = prefixed_B.to(prefix_BT.device)[:, None]
    kinds = {"prefix": prefix_BT, "prefixed": own_BT & prefixed_B1, "on_policy": own_BT & ~prefixed_B1}
    counts = {f"{kind}_tokens": mask_BT.sum() for kind, mask_BT in kinds.items()}
    return counts | {f"{kind}_clipped": (clipped_BT & mask_BT).sum() for kind, mask_BT in kinds.items()}


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
