"""Seam: the advantage estimators of `verl_prefix.advantage` as verl calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from verl_prefix import advantage, columns


def _for_verl(name: str, estimator: Callable) -> Callable:
    """`estimator`, with the columns that verl does not pass taken from the trainer (see `verl_prefix.columns`)."""

    @functools.wraps(estimator)
    def registered(*, token_level_rewards, response_mask, index=None, config=None, **given: Any):
        if "prefix_len" in given:
            return estimator(
                token_level_rewards=token_level_rewards,
                response_mask=response_mask,
                index=index,
                config=config,
                **given,
            )
        lent = columns.borrowed(f"algorithm.adv_estimator={name}")
        return lent["estimate"](
            estimator, token_level_rewards=token_level_rewards, response_mask=response_mask, index=index
        )

    return registered


REGISTERED = {name: _for_verl(name, function) for name, function in advantage.ESTIMATORS.items()}
