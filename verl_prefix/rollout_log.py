"""Columns that the plugin adds to verl's rollout log (`trainer.rollout_data_dir`, one JSONL file per step)."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

#: of a rollout's text, in the log; 20 % of a prefix of 6,000 tokens are about as many
MOST_SPANS = 2048
#: prefixes of a text that are decoded one by one where single tokens do not tell
MOST_DECODED = 256
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
    advantages: Sequence[float],
    output: str,
    ids: Sequence[int],
    piece: Callable[[int], str],
    decode: Callable[[Any], str],
) -> list[list[float]]:
    """`[end, advantage]` of the consecutive parts of `output` whose tokens have one advantage.

    [] without any, or with more than MOST_SPANS.

    Args:
        advantages: (T,) of the response's tokens, as the loss gets them.
        output: its text.
        ids: (T,) its token ids; not read where the advantage is the same throughout.
        piece: from one token id to its text.
        decode: from token ids to the text that `output` has for them.
    """
    values = np.asarray(advantages, dtype=np.float64)
    lasts = np.flatnonzero(np.diff(values, append=np.nan))  # of each part its last token
    if not 0 < len(lasts) <= MOST_SPANS:
        return []
    ends = _text_ends(output, ids, (lasts[:-1] + 1).tolist(), piece, decode)
    if ends is None:
        return []
    spans, begin = [], 0
    for last, end in zip(lasts, [*ends, len(output)], strict=True):
        if end > begin:  # not so for special tokens, which a text has not
            spans.append([end, float(f"{values[last]:.5g}")])
            begin = end
    return spans


def _text_ends(
    output: str,
    ids: Sequence[int],
    counts: Sequence[int],
    piece: Callable[[int], str],
    decode: Callable[[Any], str],
) -> list[int] | None:
    """Characters of `output` in its first n tokens, for each n of the rising `counts`."""
    if not counts:
        return []
    pieces = [piece(token) for token in ids[: counts[-1]]]
    if output.startswith("".join(pieces)):
        ends = list(itertools.accumulate(map(len, pieces), initial=0))
        return [ends[count] for count in counts]
    # Characters of several tokens, or a tokenizer that decodes a token otherwise among others: as long as it is cheap.
    if len(counts) > MOST_DECODED:
        return None
    return [text_boundary(output, decode(ids[:count])) for count in counts]


def columns(
    *,
    rows: Sequence[int],
    outputs: Sequence[str],
    response_ids: Sequence[list[int]],
    step_columns: dict[str, Any],
    decode: Callable[[Any], str],
) -> dict[str, list]:
    """One list per added column, one entry per rollout.

    `group` (the prompt's id in this step), `session`, `row_index` (the training row), `role` (prefixed, on_policy,
    padding), `prefix_len` (tokens), `prefix_chars` (characters of `output`), `prefix_ids` (token ids; [] on on-policy
    rollouts), `demo_index`, `demo_len` (tokens), `prefix_ratio`, `hit_limit` (no EOS within the response
    limit), `trained` (False: dropped by the gate, or padding), `advantages` (`advantage_spans`).

    Args:
        rows: each rollout's place in `step_columns`.
        outputs: its response as verl decoded it for the log.
        response_ids: its token ids; may be [] without a prefix and with one advantage throughout.
        step_columns: the trainer's per-row columns; `advantages` are (T,) a row, or empty.
        decode: from token ids to the text that `outputs` has for them.
    """
    log: dict[str, list] = defaultdict(list)
    piece = functools.cache(lambda token: decode([token]))
    for row, output, ids in zip(rows, outputs, response_ids, strict=True):
        length = int(step_columns["prefix_len"][row])
        real = bool(step_columns["real"][row])
        log["group"].append(step_columns["group"][row])
        log["session"].append(step_columns["session"][row])
        log["row_index"].append(step_columns["row_index"][row])
        log["role"].append((PREFIXED if length else ON_POLICY) if real else PADDING)
        log["prefix_len"].append(length)
        log["prefix_chars"].append(text_boundary(output, decode(ids[:length])) if length else 0)
        log["prefix_ids"].append(ids[:length])
        log["demo_index"].append(int(step_columns["demo_index"][row]) if length else -1)
        log["demo_len"].append(int(step_columns["demo_len"][row]) if length else 0)
        log["prefix_ratio"].append(float(step_columns["ratio"][row]) if length else 0.0)
        log["hit_limit"].append(bool(step_columns["hit_limit"][row]))
        log["trained"].append(bool(step_columns["trained"][row]))
        log["advantages"].append(advantage_spans(step_columns["advantages"][row], output, ids, piece, decode))
    return log
