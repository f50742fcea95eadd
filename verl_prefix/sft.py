"""Seam to verl's SFT trainers: `+sft=NAME` is checked when the trainer's `main` starts, and its loss put in place.

verl's trainers look `sft_loss` up in its module when they build their engine, so the loss of the preset only has to
stand there by then. The mean over all trained tokens of the global batch (every data-parallel rank, every micro-batch)
stays verl's.
"""

from __future__ import annotations

import os
import types
from functools import partial

import wrapt
from omegaconf import DictConfig

from verl_prefix import __version__
from verl_prefix.exceptions import PrefixConfigError
from verl_prefix.sft_objective import TOKEN_LOSSES

#: verl's own token loss; selecting it changes nothing
VERL_LOSS = "nll"


def select_before_training(device: types.ModuleType) -> None:
    """Import hook: `auto_set_device` is the first thing that the `main` of verl's trainers calls with the config."""

    def selecting(wrapped, instance, args, kwargs):
        config = kwargs["config"] if "config" in kwargs else args[0]
        if config is not None and config.get("sft") is not None:
            kind = check(config)
            select(kind)
            if os.environ.get("RANK", "0") == "0":
                print(banner(config, kind), flush=True)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(device, "auto_set_device", selecting)


def check(config: DictConfig) -> str:
    """The loss that `sft` asks for.

    Raises:
        PrefixConfigError: the section cannot be used; names key, value and mend.
    """
    known = ", ".join(TOKEN_LOSSES)
    if not isinstance(config.sft, DictConfig):
        mend = "the preset was not resolved: Hydra did not find the group `sft`. Is verl_prefix installed here?"
        raise PrefixConfigError("sft", config.sft, mend)
    if "actor_rollout_ref" in config:
        raise PrefixConfigError("sft", "set", "is for verl.trainer.sft_trainer; main_ppo takes +prefix=NAME.")
    for key in config.sft:
        if key != "loss":
            raise PrefixConfigError(f"sft.{key}", config.sft[key], "no such key; only sft.loss exists.")
    kind = config.sft.get("loss")
    if kind not in TOKEN_LOSSES:
        raise PrefixConfigError("sft.loss", kind, f"choose one of {known}.")
    return kind


def banner(config: DictConfig, kind: str) -> str:
    """One line: what is trained, and over what the loss is averaged."""
    return (
        f"[verl_prefix {__version__}] SFT trainer | loss {kind}, mean over all trained tokens of the global batch of "
        f"{config.data.train_batch_size} | data {config.data.custom_cls.name or 'of verl'} | engine "
        f"{config.engine.strategy} | device {config.trainer.device}"
    )


def select(kind: str) -> None:
    """Let the SFT trainers of this process use the token loss `kind` (picklable, for the trainer on Ray)."""
    from verl.workers.utils import losses

    from verl_prefix.sft_loss import reweighted_sft_loss, verl_sft_loss

    losses.sft_loss = verl_sft_loss if kind == VERL_LOSS else partial(reweighted_sft_loss, kind=kind)
