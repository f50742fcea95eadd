"""Columns of the batch at work, for functions that verl calls without them.

verl hands a registered advantage estimator only rewards, mask, group ids and config, and a registered policy loss only
log-probabilities, advantages and mask. The trainer and the loss seam lend them the missing columns for the duration of
one call, in the same thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_columns: ContextVar[dict[str, Any] | None] = ContextVar("verl_prefix_columns", default=None)


@contextmanager
def lend(**columns: Any) -> Iterator[dict[str, Any]]:
    """Make `columns` visible to `borrowed()` inside the block. The yielded dict also carries results back."""
    token = _columns.set(columns)
    try:
        yield columns
    finally:
        _columns.reset(token)


def borrowed(what: str) -> dict[str, Any]:
    """The columns lent by the caller's caller.

    Raises:
        RuntimeError: `what` was called by verl without the plugin's trainer, which lends the columns.
    """
    columns = _columns.get()
    if columns is None:
        raise RuntimeError(
            f"{what} needs the columns of a prefixed batch and was called without them. Select the whole preset "
            "(+prefix=prefix_rft) instead of this name alone: it also sets trainer.v1.trainer_mode=prefix_sync."
        )
    return columns
