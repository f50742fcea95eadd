"""Columns that the plugin adds to verl's rollout log (`trainer.rollout_data_dir`, one JSONL file per step)."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def advantage_spans(
    advantages: Sequence[float], output: str, ids: Sequence[int], decode: Callable[[Any], str]
) -> list[list[float]]:
    """`[end, advantage]` of the consecutive parts of `output` whose tokens have one advantage; [] without any.

    Args:
        advantages: (T,) of the response's tokens, as the loss gets them.
        output: its text.
        ids: (T,) its token ids; not read where the advantage is the same throughout.
        decode: from token ids to the text that `output` has for them.
    """
    values = np.asarray(advantages, dtype=np.float64)
    if not values.size:
        return []
    lasts = [*np.flatnonzero(np.diff(values)), values.size - 1]  # of each part its last token
    ends = itertools.chain(_text_ends(output, ids, [last + 1 for last in lasts[:-1]], decode), [len(output)])
    spans = [[end, float(f"{values[last]:.5g}")] for last, end in zip(lasts, ends, strict=True)]
    return [span for before, span in zip([[0]] + spans, spans, strict=False) if span[0] > before[0]]


def _text_ends(output: str, ids: Sequence[int], counts: Sequence[int], decode: Callable[[Any], str]) -> Iterator[int]:
    """Characters of `output` in its first n tokens, for each n of the rising `counts`."""
    tokens = characters = 0
    for count in counts:
        part = decode(ids[tokens:count])
        for text in (part, f" {part}"):  # some tokenizers drop the space at the head of what they decode
            if output.startswith(text, characters):
                tokens, characters = count, characters + len(text)
                yield characters
                break
        else:  # inside a multi-byte character
            yield text_boundary(output, decode(ids[:count]))


def columns(
    *,
    keys: Sequence[str],
    rows: Sequence[int],
    outputs: Sequence[str],
    response_ids: Sequence[list[int]],
    row_index: Sequence[Any],
    step_columns: dict[str, Any],
    decode: Callable[[Any], str],
) -> dict[str, list]:
    """One list per added column, one entry per rollout.

    `group` (the prompt's id in this step), `session`, `row_index` (the training row), `role` (prefixed, on_policy,
    padding), `prefix_len` (tokens), `prefix_chars` (characters of `output`), `prefix_ids` (token ids; [] on on-policy
    rollouts), `demo_index`, `demo_len` (tokens), `prefix_ratio`, `hit_limit` (no EOS within the response
    limit), `trained` (False: dropped by the gate, or padding), `advantages` (`advantage_spans`; [] where the loss has
    none).

    Args:
        keys: `{uid}_{session}_{index}` of each rollout.
        rows: its place in `step_columns`.
        outputs: its response as verl decoded it for the log.
        response_ids: its token ids; may be [] without a prefix and with one advantage throughout.
        row_index: its training row.
        step_columns: the trainer's per-row columns; `advantages` are (T,) a row, or empty.
        decode: from token ids to the text that `outputs` has for them.
    """
    log: dict[str, list] = defaultdict(list)
    for key, row, output, ids, index in zip(keys, rows, outputs, response_ids, row_index, strict=True):
        uid, session, _ = key.rsplit("_", 2)
        length = int(step_columns["prefix_len"][row])
        real = bool(step_columns["real"][row])
        log["group"].append(uid)
        log["session"].append(int(session))
        log["row_index"].append(index)
        log["role"].append((PREFIXED if length else ON_POLICY) if real else PADDING)
        log["prefix_len"].append(length)
        log["prefix_chars"].append(text_boundary(output, decode(ids[:length])) if length else 0)
        log["prefix_ids"].append(ids[:length])
        log["demo_index"].append(int(step_columns["demo_index"][row]) if length else -1)
        log["demo_len"].append(int(step_columns["demo_len"][row]) if length else 0)
        log["prefix_ratio"].append(float(step_columns["ratio"][row]) if length else 0.0)
        log["hit_limit"].append(bool(step_columns["hit_limit"][row]))
        log["trained"].append(bool(step_columns["trained"][row]))
        log["advantages"].append(advantage_spans(step_columns["advantages"][row], output, ids, decode))
    return log
