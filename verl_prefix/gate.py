"""Which rollouts of a prompt are trained on, by its on-policy success (`prefix.gate`; HPT, SuperRL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from verl_prefix.config import GateConfig
from verl_prefix.sampling import Stream, random_word


class Gate(NamedTuple):
    """Decision for the rollouts of a batch.

    Attributes:
        keep: (B,) bool, the rollout is trained on.
        failing_groups: prompts with at most `max_correct` correct on-policy rollouts.
        groups: prompts.
    """

    keep: np.ndarray
    failing_groups: int
    groups: int


def apply(config: GateConfig, *, group: Sequence[str], reward: Sequence[float], prefixed: Sequence[bool]) -> Gate:
    """Gate the rollouts of a batch. Without `prefix.gate.max_correct` all are kept and no prompt fails.

    Args:
        config: threshold and what it lets through.
        group: (B,) prompt of each rollout.
        reward: (B,) R.
        prefixed: (B,) bool, the rollout has demonstration tokens.
    """
    names, member = np.unique(np.asarray(group, dtype=str), return_inverse=True)
    prefixed = np.asarray(prefixed, dtype=bool)
    if config.max_correct is None:
        return Gate(np.ones(len(prefixed), dtype=bool), 0, len(names))
    correct = (np.asarray(reward, dtype=float) > config.correct_reward) & ~prefixed
    failing_G = np.bincount(member, weights=correct, minlength=len(names)) <= config.max_correct
    failing = failing_G[member]
    demonstrated = np.bincount(member, weights=prefixed, minlength=len(names))[member] > 0
    keep = np.ones(len(prefixed), dtype=bool)
    if config.demonstrations == "failing":
        keep &= ~prefixed | failing
    if config.on_policy == "passing":
        # A failing prompt without a demonstration keeps its rollouts: there is nothing to take their place.
        keep &= prefixed | ~failing | ~demonstrated
    return Gate(keep, int(failing_G.sum()), len(names))


def spread(rows: int, ranks: int, *, seed: int, step: int) -> list[int]:
    """An order of the batch in which what the gate left, and the padding that stands for the rest, is spread evenly in
    expectation over each worker's share, and so over the mini-batches that are cut from it.

    Args:
        rows: B, a multiple of `ranks`; worker k has rows k B / ranks to (k + 1) B / ranks.
        ranks: data-parallel workers.
        seed, step: `prefix.seed` and the training step, which key the permutation.
    """
    rng, share = np.random.default_rng(random_word(Stream.SPREAD, seed, step)), rows // ranks
    return [rank * share + int(place) for rank in range(ranks) for place in rng.permutation(share)]
