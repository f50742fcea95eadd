"""Where the configurations of runs differ, with nothing secret in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from verl_prefix.terminal import elide

REDACTED, ABSENT = "[redacted]", "[absent]"

_SECRET_NAME = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
#: a key or token is never a number: those are limits and counts (max_token_len)
_ALWAYS_SECRET = re.compile(r"secret|password|passwd|credential", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?i)\b([\w.-]*(?:key|token|secret|password|passwd)[\w.-]*\s*[=:]\s*)\S+")
_USER_IN_ADDRESS = re.compile(r"(?P<scheme>\w+://)[^/@\s]+@")
_LONGEST = 300


def differences(configs: Sequence[Mapping[str, Any] | None], folders: Sequence[str]) -> list[dict[str, Any]]:
    """The keys whose values are not the same in all runs that have a configuration, sorted.

    Args:
        configs: one composed configuration per run, None where there is none.
        folders: the runs' folder names; paths in a run's own folder count as the same.

    Returns:
        {"key", "values": one text per run, None without a configuration}. A key that a configuration lacks reads
        ABSENT; the values of names that sound secret read REDACTED, in every run.
    """
    flat = [
        None if config is None else {key: _own(value, folder) for key, value in flatten(config).items()}
        for config, folder in zip(configs, folders, strict=True)
    ]
    known = [values for values in flat if values is not None]
    found = []
    for key in sorted(set().union(*known)):
        if len({repr(values.get(key, ABSENT)) for values in known}) > 1:
            texts = [None if values is None else shown(key, values.get(key, ABSENT)) for values in flat]
            found.append({"key": key, "values": texts})
    return found


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> scalar; a list element's name is its number. An empty list or mapping is a value of its own."""
    children: list[tuple[Any, Any]] = []
    if isinstance(config, Mapping):
        children = list(config.items())
    elif isinstance(config, list):
        children = list(enumerate(config))
    if not children:
        return {path: config} if path else {}
    flat: dict[str, Any] = {}
    for name, value in children:
        flat.update(flatten(value, f"{path}.{name}" if path else str(name)))
    return flat


def shown(key: str, value: Any) -> str:
    """A value as text, short and without secrets."""
    if value == ABSENT:
        return ABSENT
    harmless = value is None or isinstance(value, bool) or value in ([], {})
    # the plugin's own keys (prefix.sft.token_weight) are checked when a run starts: none is a secret
    named = isinstance(value, str) and not key.startswith("prefix.") and _SECRET_NAME.search(key)
    if not harmless and (named or _ALWAYS_SECRET.search(key)):
        return REDACTED
    text = _USER_IN_ADDRESS.sub(rf"\g<scheme>{REDACTED}@", str(value))
    text = _ASSIGNED.sub(rf"\1{REDACTED}", text)
    return elide(text, _LONGEST - 100, 100) if len(text) > _LONGEST else text


def _own(value: Any, folder: str) -> Any:
    if not isinstance(value, str):
        return value
    # a path only: the folder of a GRPO run may be called grpo, and so is its estimator
    name = re.escape(folder)
    return re.sub(rf"[^\s=:,'\"]*/{name}(?=/|$)|(?:^|(?<=[\s=:,'\"])){name}(?=/)", "RUN", value)
