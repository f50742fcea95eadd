"""Which rollout starts with how many tokens of which demonstration (arXiv 2507.01679, Sec. 3.1).

Every choice is a pure function of (`prefix.seed`, training step, row index, session id). There is no generator to
checkpoint, and the order in which workers ask does not matter: a resumed run repeats the draws of the run it resumes.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from verl_prefix.config import PrefixConfig, SamplingConfig
from verl_prefix.schedule import low_at

_WORD = (1 << 64) - 1


class Stream(IntEnum):
    """What a random word is for. The values are part of every key: never renumber, only append."""

    DEMO_RATIO = 1
    CHOICE = 2
    POSITION = 3
    ENTROPY_CLIP = 4


@dataclass(frozen=True)
class PrefixDraw:
    """The prefix of one rollout: the first `prefix_len` tokens of demonstration `demo_index`.

    Attributes:
        demo_index: position in the `demo_lens` that the draw was made from.
        demo_len: |y*|, tokens of that demonstration.
        low: lower bound of the ratio, low_t (at most `high`).
        high: upper bound of the ratio.
        ratio: l in [low, high], before rounding to tokens and the limits on the length.
        prefix_len: L in tokens, 1 <= L <= demo_len - 1.
    """

    demo_index: int
    demo_len: int
    low: float
    high: float
    ratio: float
    prefix_len: int


def random_word(stream: Stream, *key: int | str) -> int:
    """A uniform 64-bit word that depends on `stream` and `key` alone.

    `numpy.random.SeedSequence` keeps its hash across NumPy versions, which `numpy.random.Generator` does not promise
    for its distributions. Integers count modulo 2**64 (so negative ones are fine); strings are hashed.

    Raises:
        TypeError: a part of the key is neither an integer nor a string.
    """
    words = [_key_word(part) for part in (int(stream), *key)]
    # Two fixed 32-bit halves each: SeedSequence would split a large integer into as many words as it needs, and
    # different keys could then spell the same sequence.
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    return int(np.random.SeedSequence(halves).generate_state(1, np.uint64)[0])


def keeps_demonstrations(config: PrefixConfig, row_index: int | str) -> bool:
    """Whether `prefix.demonstrations.demo_ratio` leaves the training row its demonstrations.

    Depends on seed and row only, and is nested: a row kept at ratio 0.01 is also kept at 0.1.
    """
    return _uniform(random_word(Stream.DEMO_RATIO, config.seed, row_index)) < config.demonstrations.demo_ratio


def is_prefixed_session(config: PrefixConfig, session_id: int) -> bool:
    """Whether the rollout `session_id` (from 0) of a prompt's group is one of the prefixed ones."""
    return session_id < config.sampling.rollouts


def draw_prefix(
    config: PrefixConfig, *, step: int, row_index: int | str, session_id: int, demo_lens: Sequence[int]
) -> PrefixDraw | None:
    """The prefix of one rollout, or None for a plain one.

    The demonstration is uniform among those of at least 2 tokens (shorter ones cannot be cut). Then
    l = low_t + (high - low_t) Beta(beta_a, beta_b) and L = floor(l |y*|), raised to `min_prefix_len` and lowered to
    |y*| - 1, in this order. With `prefix.sampling.shared` every prefixed session of the row gets the same draw.

    Args:
        config: seed, schedule, sampling and demo_ratio.
        step: training step, from 0.
        row_index: the row's stable identity in the training data.
        session_id: number of the rollout in its group, from 0.
        demo_lens: tokens of each usable demonstration of the row.

    Returns:
        None when the session is not a prefixed one, the row lost its demonstrations to `demo_ratio`, or no
        demonstration can be cut.
    """
    candidates = [i for i, length in enumerate(demo_lens) if length >= 2]
    if not candidates or not is_prefixed_session(config, session_id) or not keeps_demonstrations(config, row_index):
        return None
    sampling = config.sampling
    key = (config.seed, step, row_index) if sampling.shared else (config.seed, step, row_index, session_id)

    # (word * n) >> 64 is uniform on 0..n-1 up to n / 2**64, and cannot round up to n.
    demo_index = candidates[(random_word(Stream.CHOICE, *key) * len(candidates)) >> 64]
    demo_len = int(demo_lens[demo_index])

    low, high = min(low_at(config.schedule, step), sampling.high), sampling.high
    position = _beta(_uniform(random_word(Stream.POSITION, *key)), sampling)
    ratio = min(low + (high - low) * position, high)
    prefix_len = min(max(math.floor(ratio * demo_len), sampling.min_prefix_len), demo_len - 1)
    return PrefixDraw(demo_index, demo_len, low, high, ratio, prefix_len)


def _key_word(part: int | str) -> int:
    if isinstance(part, str):  # Python's own hash() changes from process to process
        return int.from_bytes(hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return operator.index(part) & _WORD


def _uniform(word: int) -> float:
    """[0, 1) with 53 bits."""
    return (word >> 11) * 2.0**-53


def _beta(u: float, sampling: SamplingConfig) -> float:
    """Beta(beta_a, beta_b) at quantile u."""
    if sampling.beta_a == sampling.beta_b == 1:
        return u
    from scipy.special import betaincinv  # only this option needs SciPy

    return float(betaincinv(sampling.beta_a, sampling.beta_b, u))
