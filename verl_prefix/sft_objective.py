"""The token losses of supervised fine-tuning. Pure functions; what they are averaged over is decided by the caller.

nll   -log p          SFT
dft   -sg(p) log p    DFT, arXiv 2508.05629, Eq. 9 (sg = stop-gradient): its gradient is that of -p
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def nll(log_prob: torch.Tensor) -> torch.Tensor:
    return -log_prob


def dft(log_prob: torch.Tensor) -> torch.Tensor:
    return -log_prob.detach().exp() * log_prob


TOKEN_LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"nll": nll, "dft": dft}


def sft_token_loss(log_prob: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss of each token, in the shape (dense or jagged) of `log_prob`.

    Args:
        log_prob: log-probability of each token under the policy, in nats.
        kind: a key of `TOKEN_LOSSES`.
    """
    return TOKEN_LOSSES[kind](log_prob)
