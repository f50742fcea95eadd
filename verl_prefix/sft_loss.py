"""verl's SFT loss with another token loss. What is averaged, over which tokens, is left to verl's own function."""

from __future__ import annotations

from typing import Any

import torch

# bound here, before verl_prefix.sft puts anything in its place
from verl.workers.utils.losses import sft_loss as verl_sft_loss

from verl_prefix.sft_objective import sft_token_loss


def reweighted_sft_loss(
    config: Any, model_output: dict[str, torch.Tensor], data: Any, dp_group: Any = None, *, kind: str
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Sum of `sft_token_loss` over the micro-batch's trained tokens / trained tokens of the global batch.

    Arguments and result are those of verl's `sft_loss`. That one is -sum(log_prob) / tokens, so it is given minus the
    token loss for the log-probability.
    """
    log_prob = -sft_token_loss(model_output["log_probs"], kind)
    return verl_sft_loss(config, {**model_output, "log_probs": log_prob}, data, dp_group)
