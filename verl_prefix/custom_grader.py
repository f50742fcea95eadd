"""A reward function named by its file or module, found and called as verl does `reward.custom_reward_function`."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from verl_prefix.exceptions import PrefixConfigError
from verl_prefix.preview import Grade
from verl_prefix.preview_rows import Row

_PACKAGE, _FILE = "pkg://", "file://"


class Graded(Protocol):
    """What a grader is told of a problem."""

    @property
    def data_source(self) -> Any: ...
    @property
    def ground_truth(self) -> Any: ...
    @property
    def extra_info(self) -> Mapping[str, Any]: ...


def load(path: str | None) -> Grade:
    """For the preview: the score that `compute_score` of `path` gives; None: the project's own grader.

    Args:
        path: a Python file, also as `file://PATH`, or `pkg://PACKAGE.MODULE`.

    Raises:
        PrefixConfigError: no such file or module, it cannot be imported, or it has no `compute_score`.
    """
    compute_score = find(path or f"{_PACKAGE}verl_prefix.reward")

    def grade(row: Row, text: str) -> float:
        result = call(compute_score, row, text)
        return float(result["score"] if isinstance(result, dict) else result)

    return grade


def call(compute_score: Callable[..., Any], row: Graded, text: str, **kwargs: Any) -> Any:
    """What the function returns for the response `text` to `row`; a coroutine is run to its end.

    Args:
        kwargs: verl's `reward_kwargs`.
    """
    result = compute_score(
        data_source=row.data_source,
        solution_str=text,
        ground_truth=row.ground_truth,
        extra_info=dict(row.extra_info),
        **kwargs,
    )
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def find(path: str, name: str = "compute_score") -> Callable[..., Any]:
    """The function `name` of the file or module at `path`.

    Raises:
        PrefixConfigError: as in `load`.
    """
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise PrefixConfigError("--grader", path, f"defines no function {name}.")
    return function


def _module(path: str) -> Any:
    try:
        if path.startswith(_PACKAGE):
            return importlib.import_module(path.removeprefix(_PACKAGE).replace("/", "."))
        file = Path(path.removeprefix(_FILE))
        if not file.is_file():
            raise PrefixConfigError("--grader", path, "the file does not exist.")
        spec = importlib.util.spec_from_file_location("verl_prefix_custom_grader_file", file)
        if spec is None or spec.loader is None:
            raise PrefixConfigError("--grader", path, "is not a Python file; name one that defines compute_score.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except PrefixConfigError:
        raise
    except Exception as error:
        mend = f"cannot be imported ({error!r}); mend it, or install what it needs."
        raise PrefixConfigError("--grader", path, mend) from error
