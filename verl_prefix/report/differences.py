"""Where the configurations of runs differ, with nothing secret in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from verl_prefix.redaction import flatten, shown

ABSENT = "[absent]"


def differences(configs: Sequence[Mapping[str, Any] | None], folders: Sequence[str]) -> list[dict[str, Any]]:
    """The keys whose values are not the same in all runs that have a configuration, sorted.

    Args:
        configs: one composed configuration per run, None where there is none.
        folders: the runs' folder names; paths in a run's own folder count as the same.

    Returns:
        {"key", "values": one text per run, None without a configuration}. A key that a configuration lacks reads
        ABSENT; the values of names that sound secret read redaction.REDACTED, in every run.
    """
    flat = [
        None if config is None else {key: _own(value, folder) for key, value in flatten(config).items()}
        for config, folder in zip(configs, folders, strict=True)
    ]
    known = [values for values in flat if values is not None]
    found = []
    for key in sorted(set().union(*known)):
        if len({repr(values.get(key, ABSENT)) for values in known}) > 1:
            texts = [None if values is None else _shown(key, values.get(key, ABSENT)) for values in flat]
            found.append({"key": key, "values": texts})
    return found


def _shown(key: str, value: Any) -> str:
    return ABSENT if value == ABSENT else shown(key, value)


def _own(value: Any, folder: str) -> Any:
    if not isinstance(value, str):
        return value
    # a path only: the folder of a GRPO run may be called grpo, and so is its estimator
    name = re.escape(folder)
    return re.sub(rf"[^\s=:,'\"]*/{name}(?=/|$)|(?:^|(?<=[\s=:,'\"])){name}(?=/)", "RUN", value)
