"""Faults inside a run: what it refuses to go on with, and what a full disk must not end (docs/faults.md)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from verl_prefix.exceptions import NotFiniteError

logger = logging.getLogger(__name__)

GRAD_NORM = "actor/grad_norm"


def warn(message: str) -> None:
    """Say it in the log and as a Python warning: a Ray worker's log level may hide the one or the other."""
    message = f"[verl_prefix] {message}"
    logger.warning(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def require_finite(step: int, keys: Sequence[str], **columns: torch.Tensor) -> None:
    """Refuse NaN and infinity before they reach an advantage or a loss.

    Args:
        step: training step.
        keys: (B,) the rollouts' keys.
        columns: what was measured -> its values, (B,), (B, T) or nested (B, response).

    Raises:
        NotFiniteError: names step, column and rollouts.
    """
    for name, column in columns.items():
        values = column.values() if column.is_nested else column
        # NaN and infinity always reach the sum, which takes a tenth of the time of looking at each value.
        if not values.sum().isfinite() and not values.isfinite().all():
            bad = {key: int((~row.isfinite()).sum()) for key, row in zip(keys, column.unbind(), strict=True)}
            raise NotFiniteError(step, name, {key: count for key, count in bad.items() if count})


def skipped_update(actor_metrics: dict[str, Any], step: int) -> dict[str, float]:
    """`actor/update_skipped` of one training step, and a warning where it is 1.

    verl's FSDP engine skips the update of a mini-batch whose gradient norm is not finite, and only prints it.

    Args:
        actor_metrics: verl's, averaged over the mini-batches; NaN or infinity of one stays in the average.
        step: training step.
    """
    norm = actor_metrics.get(GRAD_NORM)
    if norm is None:
        return {}
    skipped = not np.isfinite(norm)
    if skipped:
        warn(
            f"step {step}: {GRAD_NORM} is {float(norm)} (actor/pg_loss {actor_metrics.get('actor/pg_loss')}); at "
            "least one mini-batch's update was skipped. Once is harmless; if it goes on the run learns nothing: "
            "look at actor/pg_loss and actor/ppo_kl, lower the learning rate, or train in float32 or bfloat16."
        )
    return {"actor/update_skipped": float(skipped)}


class LostLines:
    """Counts what could not be written to one log, and warns when losing begins."""

    def __init__(self, log: str):
        self._log, self._losing = log, False
        self.count = 0

    def add(self, lines: int, file: Any, error: Exception) -> None:
        """`lines` lines of `file` are lost."""
        self.count += lines
        if not self._losing:
            warn(f"{self._log}: {lines} lines of {file} are lost ({error}); training goes on. Free the disk.")
        self._losing = True

    def written(self) -> None:
        """A write succeeded, so the next failure is news again."""
        self._losing = False


def discard(file: Path) -> None:
    """Remove a file that could not be written whole: half a line would break its readers."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        logger.warning("%s could not be removed; its last line may be half a line", file, exc_info=True)


class WholeLines:
    """An unbuffered binary file that keeps a line whole or not at all, and does not raise on a full disk."""

    def __init__(self, file: IO[bytes], lost: LostLines):
        self._file, self._lost = file, lost

    def write(self, line: bytes) -> int:
        start = self._file.tell()
        try:
            written = self._file.write(line)  # less than asked for where the disk had room for a part
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted")
            self._lost.written()
        except OSError as error:
            self._lost.add(1, self._file.name, error)
            try:
                self._file.truncate(start)
                self._file.seek(start)
            except OSError:  # no regular file
                logger.warning("%s cannot be cut back", self._file.name, exc_info=True)
        return len(line)

    def close(self) -> None:
        self._file.close()
