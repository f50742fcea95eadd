r"""The reward function of the testbed: exact match of the last `\boxed{...}`.

verl loads this file by path (`custom_reward_function.path`), so it imports nothing. An exception in a reward function
evicts the whole group of rollouts, which biases training without a word: this one never raises.
"""

from __future__ import annotations

from typing import Any

OPEN = "\\boxed{"


def last_boxed(text: Any) -> str | None:
    """What stands in the last box that was opened; None if there is none, it is not closed, or `text` is no string."""
    if not isinstance(text, str):
        return None
    start = text.rfind(OPEN)
    if start < 0:
        return None
    start += len(OPEN)
    end = text.find("}", start)
    return text[start:end] if end >= 0 else None


def compute_score(
    data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, **kwargs: Any
) -> dict[str, float]:
    """1.0 if the last box holds exactly `ground_truth`, else 0.0."""
    answer = last_boxed(solution_str)
    score = float(answer is not None and isinstance(ground_truth, str) and answer == ground_truth)
    return {"score": score, "acc": score}
