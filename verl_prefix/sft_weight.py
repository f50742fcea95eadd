"""Row weights of the SFT term: mu_t over the number of demonstration tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def mini_batches(loss_agg_mode: str, *, planned: int, left: int) -> int:
    """Over how many mini-batches of a pass the SFT term is spread: a gate does not change its weight against the policy
    term.

    A gate leaves fewer rows, of which verl cuts fewer mini-batches. The normalisers of its `seq-*` modes are those of a
    full mini-batch all the same, so the policy term of a rollout stays what it is in a full batch; `token-mean` divides
    by the tokens that are there.

    Args:
        loss_agg_mode: `actor.loss_agg_mode`.
        planned: mini-batches of a full batch.
        left: mini-batches of what is there.
    """
    return max(left, 1) if loss_agg_mode == "token-mean" else planned


def sft_row_weights(
    prefix_len: Tensor,
    real: Tensor,
    *,
    weight: float,
    mini_batches: int,
    dropped_tokens: int = 0,
    factor: Tensor | float = 1.0,
) -> Tensor:
    """(B,) float32 such that the sum over tokens of row weight * x is, on average over the optimizer steps of one pass
    through the batch, weight * mean(x).

    The divisor is the batch's number of demonstration tokens over its number of mini-batches: one global token mean,
    whatever part of the tokens a mini-batch, a micro-batch or a worker happens to hold. 0 on rows without any.
    Demonstrations that a gate dropped count in the divisor: a prompt weighs the same whichever way its gate goes.

    Args:
        prefix_len: (B,) demonstration tokens of each rollout.
        real: (B,) bool, False on synthetic padding rows.
        weight: mu_t.
        mini_batches: optimizer steps per pass through the batch, see `mini_batches`.
        dropped_tokens: demonstration tokens that the gate took out of the batch.
        factor: (B,) weight of each demonstration, outside of the divisor.
    """
    tokens_B = torch.where(real, prefix_len, 0).float()
    per_step = (tokens_B.sum() + dropped_tokens) / mini_batches
    return torch.where(tokens_B > 0, factor * weight / per_step.clamp(min=1e-9), 0.0)


def entropy_factor(entropy: Tensor, prefix_len: Tensor, *, sign: int) -> Tensor:
    """(B,) float32 exp(sign * H), H the mean entropy of a row's demonstration tokens: SRFT, arXiv 2506.19767, whose
    weight stands before the expectation over the tokens. 1 on rows without any.

    Args:
        entropy: (B, T) of the old policy in nats.
        prefix_len: (B,) demonstration tokens, the first ones of the response.
        sign: -1 or 1.
    """
    demonstration_BT = torch.arange(entropy.shape[1]) < prefix_len[:, None]
    mean_B = torch.where(demonstration_BT, entropy, 0.0).sum(dim=1) / prefix_len.clamp(min=1)
    return (sign * mean_B).exp().float()
