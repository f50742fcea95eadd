r"""avg@k, pass@k and their confidence intervals.

Of a problem's n samples c are right. Its accuracy (avg@n) is c/n. pass@k is the chance that k samples drawn from the n
without replacement hold a right one, an unbiased estimate of 1 - (1-p)^k for independent samples (Chen et al., arXiv
2107.03374):

    pass@k = 1 - C(n-c, k) / C(n, k)

A data set's value is the mean over its problems, and its interval a percentile bootstrap over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
#: resampled cells held in memory at once
_CELLS = 4_000_000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of a problem with `c` of `n` samples right; pass@1 is c/n.

    Raises:
        ValueError: not 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} with {c} of {n} right: it takes 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """The k to report of n samples: powers of two below n, and n."""
    return [1 << i for i in range(n.bit_length()) if 1 << i < n] + [n]


def bootstrap(values_PK: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of `resamples` draws of P problems with replacement, (resamples, K); the K columns share their draws.

    Only problems are drawn: what sampling adds is in the problems' own estimates already.
    """
    generator = np.random.default_rng(seed)
    problems = len(values_PK)
    means = np.empty((resamples, values_PK.shape[1]))
    block = max(1, _CELLS // (problems * values_PK.shape[1]))
    for begin in range(0, resamples, block):
        end = min(begin + block, resamples)
        means[begin:end] = values_PK[generator.integers(problems, size=(end - begin, problems))].mean(axis=1)
    return means


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrap means, (resamples,)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _estimate(value: float, means: np.ndarray) -> dict[str, float]:
    low, high = interval(means)
    return {"value": float(value), "low": low, "high": high}


def of_set(outcomes: Sequence[Sequence[bool]], *, seed: int = 0) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """avg and pass@k of one data set.

    Args:
        outcomes: per problem its samples, right or not; each problem has at least one.

    Returns:
        {"avg": {value, low, high}, "pass@1": ..., ...} with k up to the fewest samples of a problem, and the bootstrap
        means of avg (resamples,), from which a mean over sets gets its interval.
    """
    counts = [(len(samples), sum(map(bool, samples))) for samples in outcomes]
    wanted = ks(min(n for n, _ in counts))
    values = np.array([[pass_at_k(n, c, k) for k in wanted] for n, c in counts])
    means = bootstrap(values, seed=seed)
    estimates = {f"pass@{k}": _estimate(values[:, i].mean(), means[:, i]) for i, k in enumerate(wanted)}
    return {"avg": estimates["pass@1"], **estimates}, means[:, 0]


def over_sets(averages: Sequence[float], means: Sequence[np.ndarray]) -> dict[str, float]:
    """Unweighted mean of sets; problems were drawn within each set, independently of the others' (seeds differ)."""
    return _estimate(np.mean(averages), np.mean(means, axis=0))
