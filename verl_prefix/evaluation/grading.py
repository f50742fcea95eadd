"""The grader of an evaluation, called as verl calls `reward.custom_reward_function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verl_prefix import custom_grader
from verl_prefix.evaluation.problems import Problem
from verl_prefix.exceptions import EvaluationError

DEFAULT = "pkg://verl_prefix.reward"


def load(spec: str, kwargs: Mapping[str, Any]) -> Callable[[Problem, str], dict[str, Any]]:
    """The function that `spec` names, as grade(problem, response) -> its result as a dict.

    Args:
        spec: `FILE.py`, `pkg://PACKAGE.MODULE`, either with `:NAME` behind it if it is not compute_score.
        kwargs: verl's `reward_kwargs`.

    Raises:
        PrefixConfigError: no such file, module or function.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        path, name = spec, "compute_score"
    function = custom_grader.find(path, name)

    def grade(problem: Problem, response: str) -> dict[str, Any]:
        result = custom_grader.call(function, problem, response, **kwargs)
        return dict(result) if isinstance(result, Mapping) else {"score": float(result)}

    return grade


def correct(grade: Mapping[str, Any], where: str) -> bool:
    """Whether a graded sample is right: `acc` as in verl's validation, `score` where there is none.

    Raises:
        EvaluationError: neither is there, or it is not 0 or 1, so that nothing could be counted.
    """
    name = "acc" if grade.get("acc") is not None else "score"
    value = grade.get(name)
    if value not in (0, 1):
        raise EvaluationError(
            f"{where}: {name} is {value!r}; pass@k counts right and wrong. Let the grader return `acc`, 0 or 1."
        )
    return bool(value)
