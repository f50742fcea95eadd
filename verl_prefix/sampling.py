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
from typing import Any

import numpy as np

from verl_prefix.config import PrefixConfig, SamplingConfig
from verl_prefix.demonstrations import DemonstrationTokenizer
from verl_prefix.schedule import value_at

_WORD = (1 << 64) - 1


class Stream(IntEnum):
    """What a random word is for. The values are part of every key: never renumber, only append."""

    DEMO_RATIO = 1
    CHOICE = 2
    POSITION = 3
    ENTROPY_CLIP = 4
    SPREAD = 5


@dataclass(frozen=True)
class PrefixDraw:
    """The prefix of one rollout: the first `prefix_len` tokens of demonstration `demo_index`.

    Attributes:
        demo_index: position in the `demo_lens` that the draw was made from.
        demo_len: |y*|, tokens of that demonstration.
        low: lower bound of the ratio; low_t (at most `high`) for `law=beta`.
        high: upper bound of the ratio.
        ratio: l in [low, high], before rounding to tokens and the limits on the length.
        prefix_len: L in tokens, 1 <= L <= demo_len - 1; demo_len for `law=whole`; 0 is possible for
            `binomial` and `adaptive`.
    """

    demo_index: int
    demo_len: int
    low: float
    high: float
    ratio: float
    prefix_len: int

    @property
    def is_whole(self) -> bool:
        """Nothing is left to generate."""
        return self.prefix_len == self.demo_len


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


def has_prefixes(config: PrefixConfig, step: int) -> bool:
    """Whether training step `step` draws prefixes at all (`prefix.sampling.until`)."""
    return config.sampling.until is None or step <= config.sampling.until


def wants_prefix(config: PrefixConfig, *, step: int, row_index: int | str, session_id: int) -> bool:
    """Whether the rollout gets a prefix, given that its row has a demonstration that can be cut."""
    return (
        is_prefixed_session(config, session_id)
        and has_prefixes(config, step)
        and keeps_demonstrations(config, row_index)
    )


def draw_prefix(
    config: PrefixConfig,
    *,
    step: int,
    row_index: int | str,
    session_id: int,
    demo_lens: Sequence[int],
    demo_steps: Sequence[Sequence[int]] = (),
    interval: tuple[float, float] = (0.0, 1.0),
) -> PrefixDraw | None:
    """The prefix of one rollout, or None for a plain one.

    The demonstration is uniform among those of at least 2 tokens (shorter ones cannot be cut). Then the ratio l is
    drawn by `prefix.sampling.law` and L = floor(l |y*|), raised to `min_prefix_len` and lowered to |y*| - 1, in this
    order (`whole`: L = |y*|). With `prefix.sampling.shared` every prefixed session of the row gets the same draw.

    Args:
        config: seed, schedule, sampling and demo_ratio.
        step: training step, from 0.
        row_index: the row's stable identity in the training data.
        session_id: number of the rollout in its group, from 0.
        demo_lens: tokens of each usable demonstration of the row.
        demo_steps: for `prefix.sampling.at_steps`: for each of them the tokens up to the end of each of its steps.
        interval: the prompt's own bounds of l, for `law=adaptive` alone (see `verl_prefix.adaptive`).

    Returns:
        None when the session is not a prefixed one, the step draws no prefixes, the row lost its demonstrations to
        `demo_ratio`, or no demonstration can be cut. `law=binomial` and `adaptive` may draw less than a token: then the
        draw has length 0 and the rollout is a plain one.
    """
    candidates = [i for i, length in enumerate(demo_lens) if length >= 2]
    if not candidates or not wants_prefix(config, step=step, row_index=row_index, session_id=session_id):
        return None
    sampling = config.sampling
    key = (config.seed, step, row_index) if sampling.shared else (config.seed, step, row_index, session_id)

    # (word * n) >> 64 is uniform on 0..n-1 up to n / 2**64, and cannot round up to n.
    demo_index = candidates[(random_word(Stream.CHOICE, *key) * len(candidates)) >> 64]
    demo_len = int(demo_lens[demo_index])

    low, high = ratio_bounds(config, step, interval)
    scheduled, uniform = value_at(config.schedule, step), _uniform(random_word(Stream.POSITION, *key))
    if sampling.at_steps and demo_steps and demo_steps[demo_index]:
        drawn_len = _step_len(demo_steps[demo_index], uniform, sampling.parts, scheduled)
        ratio = drawn_len / demo_len
    else:
        ratio = _ratio(sampling, low, high, scheduled, uniform)
        drawn_len = math.floor(ratio * demo_len)
    if sampling.law == "whole":
        return PrefixDraw(demo_index, demo_len, low, high, ratio, demo_len)
    if sampling.law in ("binomial", "adaptive") and drawn_len == 0:
        return PrefixDraw(demo_index, demo_len, low, high, ratio, 0)
    prefix_len = min(max(drawn_len, sampling.min_prefix_len), demo_len - 1)
    return PrefixDraw(demo_index, demo_len, low, high, ratio, prefix_len)


def ratio_bounds(config: PrefixConfig, step: int, interval: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Bounds of the prefix ratio l at training step `step`, by `prefix.sampling.law`."""
    sampling, scheduled = config.sampling, value_at(config.schedule, step)
    return {
        "beta": (min(scheduled, sampling.high), sampling.high),
        "fixed": (scheduled, scheduled),
        "binomial": (0.0, 1.0),
        "adaptive": interval,
        "whole": (1.0, 1.0),
    }[sampling.law]


def _step_len(step_ends: Sequence[int], uniform: float, parts: int, p: float) -> int:
    """Tokens of the first k of n runs of steps, k ~ Binomial(n, p) at quantile `uniform`; n is `parts`, or S if less.

    The k-th run ends with step round(k S / n) of S, as in UFT's code (arXiv 2505.16984).

    Args:
        step_ends: S >= 1 of them, tokens up to the end of each step.
    """
    n = min(parts, len(step_ends))
    k = _binomial(uniform, n, p)
    return step_ends[round(k * len(step_ends) / n) - 1] if k else 0


def _ratio(sampling: SamplingConfig, low: float, high: float, scheduled: float, uniform: float) -> float:
    """The prefix ratio at quantile `uniform` of `sampling.law`."""
    if sampling.law == "binomial":
        return _binomial(uniform, sampling.parts, scheduled) / sampling.parts
    position = _beta(uniform, sampling) if sampling.law == "beta" else uniform
    return min(low + (high - low) * position, high)


def cut_prefix(
    config: PrefixConfig,
    demonstrations: DemonstrationTokenizer,
    cell: Any,
    *,
    step: int,
    row_index: int | str,
    session_id: int,
    steps: Any = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> tuple[PrefixDraw | None, list[int]]:
    """The prefix of one rollout from its row's demonstration cell: the draw and its token ids (with an EOS after a
    whole demonstration); (None, []) for a plain rollout. Training and `verl-prefix preview` both ask here. A plain
    session tokenises nothing.

    Args:
        cell: the row's demonstrations as the data file holds them (see `demonstrations.as_list`); unusable ones are
            left out, so that `PrefixDraw.demo_index` counts the usable ones.
        step: verl's global step, from 1.
        row_index: the row's `extra_info.index`.
        session_id: number of the rollout in its group, from 0.
        steps: for each entry of `cell` the ends of its steps in characters, for `prefix.sampling.at_steps`.
        interval: see `draw_prefix`.
    """
    if not is_prefixed_session(config, session_id):
        return None, []
    usable = demonstrations.usable(cell)
    draw = draw_prefix(
        config,
        step=step,
        row_index=row_index,
        session_id=session_id,
        demo_lens=[len(ids) for ids in usable],
        demo_steps=demonstrations.step_lens(cell, steps) if config.sampling.at_steps else (),
        interval=interval,
    )
    if draw is None:
        return None, []
    ids = list(usable[draw.demo_index][: draw.prefix_len])
    return draw, [*ids, demonstrations.tokenizer.eos_token_id] if draw.is_whole else ids


def prefix_record(draw: PrefixDraw | None, *, hit_limit: bool, no_demonstration: bool = False) -> dict[str, Any]:
    """What the trainer and the rollout log want to know of one rollout's prefix. Equal keys in every row.

    Args:
        hit_limit: no EOS within the response limit.
        no_demonstration: the rollout was to have a prefix, and its row has no usable demonstration.
    """
    empty = {"demo_index": -1, "demo_len": 0, "low": math.nan, "high": math.nan, "ratio": 0.0}
    drawn = empty if draw is None else {key: getattr(draw, key) for key in empty}
    return {**drawn, "hit_limit": hit_limit, "no_demonstration": no_demonstration}


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


def _binomial(u: float, n: int, p: float) -> int:
    """Binomial(n, p) at quantile u."""
    reached = 0.0
    for k in range(n):
        reached += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if u < reached:
            return k
    return n
