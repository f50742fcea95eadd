r"""The reward function for training and validation: right or wrong, graded in bounded time.

    reward.custom_reward_function.path=pkg://verl_prefix.reward reward.custom_reward_function.name=compute_score

and, if the response has to think first,

    +reward.custom_reward_function.reward_kwargs.think_format=True

verl calls it in a thread of each of its `reward.num_workers` processes; an exception would cost it the whole group of
rollouts. This function never raises. How answers are compared: `docs/grader.md`.
"""

from __future__ import annotations

import logging
from typing import Any

from verl_prefix.grading.pool import Grade, GraderPool

logger = logging.getLogger(__name__)

_pools: dict[tuple[int, float], GraderPool] = {}


def compute_score(
    data_source: Any,
    solution_str: Any,
    ground_truth: Any,
    extra_info: Any = None,
    *,
    think_format: bool = False,
    correct: float = 1.0,
    wrong: float = 0.0,
    deadline: float = 5.0,
    workers: int = 2,
    **kwargs: Any,
) -> dict[str, float]:
    r"""Score one response. Every data source is graded alike: mathematics, choice letters and words.

    Args:
        solution_str: the response; its answer is the last `\boxed{}`, or the last `#### n` where there is no box.
        ground_truth: the answer, or a list (or JSON list) of accepted ones, in any spelling.
        think_format: the answer must come after the last `</think>`.
        correct, wrong: the two values of `score`.
        deadline: seconds of one comparison. workers: grader processes of this process, started when needed.
        extra_info, kwargs: taken because verl passes them, and not used.

    Returns:
        `score`; `acc` (1.0 or 0.0); and 0.0 or 1.0 each, which verl averages: `grader_no_answer` (none found, or the
        thinking not closed), `grader_unparsable` (answer or truth), `grader_timeout`, `grader_crash`.
    """
    try:
        correct, wrong = float(correct), float(wrong)
    except (TypeError, ValueError):
        logger.warning("correct=%r, wrong=%r are not numbers; 1.0 and 0.0 are used", correct, wrong)
        correct, wrong = 1.0, 0.0
    try:
        grade = _pool(int(workers), float(deadline)).grade(solution_str, ground_truth, think_format=bool(think_format))
    except Exception:
        logger.warning("the grader failed; the response counts as wrong", exc_info=True)
        grade = Grade(0.0, "crash")
    return {
        "score": correct if grade.score else wrong,
        "acc": grade.score,
        "grader_no_answer": float(grade.reason in ("no_answer", "format")),
        "grader_unparsable": float(grade.reason in ("unparsable", "truth_unparsable")),
        "grader_timeout": float(grade.reason == "timeout"),
        "grader_crash": float(grade.reason == "crash"),
    }


def _pool(workers: int, deadline: float) -> GraderPool:
    # no lock: a process forked while another thread holds it would wait for ever
    pool = _pools.get((workers, deadline))
    return pool or _pools.setdefault((workers, deadline), GraderPool(workers, deadline))
