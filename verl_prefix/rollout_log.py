"""Columns that the plugin adds to verl's rollout log (`trainer.rollout_data_dir`, one JSONL file per step)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PREFIXED, ON_POLICY, PADDING = "prefixed", "on_policy", "padding"


def delete_up_to(folder: Path, step: int) -> None:
    """Delete the log's files of `step` and of the steps before it."""
    for file in folder.glob("*.jsonl"):
        if file.stem.isdigit() and int(file.stem) <= step:
            try:
                file.unlink(missing_ok=True)
            except OSError:
                logger.warning("%s could not be deleted", file, exc_info=True)


def text_boundary(output: str, prefix: str) -> int:
    """Characters of `output` that belong to the prefix.

    `prefix` is the decoded prefix alone. A cut inside a multi-byte character decodes to a replacement mark there, so
    the boundary is where the two texts part.
    """
    if output.startswith(prefix):
        return len(prefix)
    limit = min(len(output), len(prefix))
    return next((i for i in range(limit) if output[i] != prefix[i]), limit)


def columns(
    *,
    keys: Sequence[str],
    rows: Sequence[int],
    outputs: Sequence[str],
    prefix_ids: Sequence[list[int]],
    row_index: Sequence[Any],
    step_columns: dict[str, Any],
    decode: Callable[[Any], str],
) -> dict[str, list]:
    """One list per added column, one entry per rollout.

    `group` (the prompt's id in this step), `session`, `row_index` (the training row), `role` (prefixed, on_policy,
    padding), `prefix_len` (tokens), `prefix_chars` (characters of `output`), `prefix_ids` (token ids; [] on on-policy
    rollouts), `demo_index`, `demo_len` (tokens), `prefix_ratio`, `hit_limit` (no EOS within the response
    limit), `trained` (False: dropped by the gate, or padding).

    Args:
        keys: `{uid}_{session}_{index}` of each rollout.
        rows: its place in `step_columns`.
        outputs: its response as verl decoded it for the log.
        prefix_ids: token ids of its prefix, [] without one.
        row_index: its training row.
        step_columns: the trainer's per-row columns.
        decode: from token ids to the text that `outputs` has for them.
    """
    log: dict[str, list] = defaultdict(list)
    for key, row, output, ids, index in zip(keys, rows, outputs, prefix_ids, row_index, strict=True):
        uid, session, _ = key.rsplit("_", 2)
        length = len(ids)
        real = bool(step_columns["real"][row])
        log["group"].append(uid)
        log["session"].append(int(session))
        log["row_index"].append(index)
        log["role"].append((PREFIXED if length else ON_POLICY) if real else PADDING)
        log["prefix_len"].append(length)
        log["prefix_chars"].append(text_boundary(output, decode(ids)) if length else 0)
        log["prefix_ids"].append(ids)
        log["demo_index"].append(int(step_columns["demo_index"][row]) if length else -1)
        log["demo_len"].append(int(step_columns["demo_len"][row]) if length else 0)
        log["prefix_ratio"].append(float(step_columns["ratio"][row]) if length else 0.0)
        log["hit_limit"].append(bool(step_columns["hit_limit"][row]))
        log["trained"].append(bool(step_columns["trained"][row]))
    return log
