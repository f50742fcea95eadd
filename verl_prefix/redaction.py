"""Secrets in a configuration, by the names they go by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verl_prefix.terminal import elide

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
#: a key or token is never a number: those are limits and counts (max_token_len)
_ALWAYS_SECRET = re.compile(r"secret|password|passwd|credential", re.IGNORECASE)
#: names that verl has for nothing else: its prompt_key and stop_token are none
_CERTAIN = re.compile(
    r"secret|password|passwd|credential|(?:api|access|private|auth)_?key|(?:access|auth|api|hf|hub)_?token|\btoken$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"(?i)\b([\w.-]*(?:key|token|secret|password|passwd)[\w.-]*\s*[=:]\s*)\S+")
_USER_IN_ADDRESS = re.compile(r"(?P<scheme>\w+://)[^/@\s]+@")
_LONGEST = 300


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
    harmless = value is None or isinstance(value, bool) or value in ([], {})
    # the plugin's own keys (prefix.sft.token_weight) are checked when a run starts: none is a secret
    named = isinstance(value, str) and not key.startswith("prefix.") and _SECRET_NAME.search(key)
    if not harmless and (named or _ALWAYS_SECRET.search(key)):
        return REDACTED
    text = _USER_IN_ADDRESS.sub(rf"\g<scheme>{REDACTED}@", str(value))
    text = _ASSIGNED.sub(rf"\1{REDACTED}", text)
    return elide(text, _LONGEST - 100, 100) if len(text) > _LONGEST else text


def secrets(config: Any) -> list[str]:
    """The dotted keys of a configuration whose values certainly are secrets."""
    flat = sorted(flatten(config).items())
    return [key for key, value in flat if isinstance(value, str) and value and _CERTAIN.search(key)]
