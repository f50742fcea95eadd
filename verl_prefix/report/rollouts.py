"""A sample of a run's rollout log that fits a size limit: whole groups, the same prompts at all steps.

The log of 1,000 steps with 1,024 rollouts each is gigabytes. Steps are taken evenly, the first and the last among
them; within a step come first the groups whose prompt has the lowest hash. So a prompt can be followed over steps and
runs, and the same log gives the same sample.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_prefix.terminal import elide, printable

#: this many steps are read, more if the files are small: up to READ_FACTOR times the size limit
MAX_STEPS = 100
READ_FACTOR = 20
#: a longer text keeps this many characters of its head and its tail
HEAD, TAIL = 4000, 2000

Rollout = dict[str, Any]
#: first character, end, advantage
Span = tuple[int, int, float]


@dataclass
class Sample:
    """Groups of rollouts, and how much of the log they are.

    `groups` has one entry per group kept: `step`, `row` (the training row), `prompt`, `truth` and `rollouts`, each
    a list `[session, role, score, prefix_len, demo_len, ratio, hit_limit, trained, prefix, rest]`. Prefix and rest are
    each a text, or, where the log has advantages, `[text, advantage, text, advantage, ...]` (None: what is left out).
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    log_steps: int = 0
    steps: int = 0
    rollouts_read: int = 0
    rollouts_kept: int = 0
    unreadable: int = 0

    def left_out(self) -> str:
        """What of the log is not here, in a sentence."""
        if not self.log_steps:
            return "no rollout log"
        text = (
            f"{self.rollouts_kept:,} of {self.rollouts_read:,} rollouts of {self.steps:,} of {self.log_steps:,} steps"
        )
        return text + (f", {self.unreadable:,} unreadable lines" if self.unreadable else "")


def sample(folder: Path, budget: int) -> Sample:
    """Groups of `folder`/STEP.jsonl whose JSON (`dump`) takes at most `budget` bytes."""
    files = {int(file.stem): file for file in folder.glob("*.jsonl") if file.stem.isdigit()}
    found = Sample(log_steps=len(files))
    size = sum(file.stat().st_size for file in files.values())
    chosen = evenly(sorted(files), max(MAX_STEPS, len(files) * READ_FACTOR * budget // max(size, 1)))
    spent = 0
    for done, step in enumerate(chosen, start=1):
        # what an earlier step has left unused goes to the later ones
        allowance = budget * done // len(chosen)
        rollouts, unreadable = _read(files[step])
        found.unreadable += unreadable
        found.rollouts_read += len(rollouts)
        kept = False
        for _, members in sorted(_groups(rollouts).items(), key=lambda item: (_rank(item[1][0]), item[0])):
            group = _group(step, members)
            cost = len(dump(group))
            if spent + cost > allowance:
                break
            spent += cost
            kept = True
            found.groups.append(group)
            found.rollouts_kept += len(members)
        found.steps += kept
    return found


def evenly(steps: list[int], most: int) -> list[int]:
    """At most `most` of the sorted `steps`, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def dump(value: Any) -> str:
    """Compact JSON in ASCII, without what HTML could read as markup. Raises ValueError on numbers that are not finite.

    Escaped inside of strings only: none of these characters occurs elsewhere in JSON.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(file: Path) -> tuple[list[Rollout], int]:
    rollouts, unreadable = [], 0
    for line in _lines(file):
        try:
            rollout = json.loads(line)
        except ValueError:  # being written, or not UTF-8
            unreadable += 1
            continue
        if isinstance(rollout, dict):
            rollouts.append(rollout)
        else:
            unreadable += 1
    return rollouts, unreadable


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield line


def _groups(rollouts: list[Rollout]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        # stock verl writes no `group`: its uid is GROUP_SESSION_TURN
        key = rollout.get("group") or str(rollout.get("uid", rollout.get("input"))).rsplit("_", 2)[0]
        groups.setdefault(str(key), []).append(rollout)
    return groups


def _rank(rollout: Rollout) -> str:
    return hashlib.sha256(str(rollout.get("input")).encode("utf-8", "surrogatepass")).hexdigest()


def _group(step: int, members: list[Rollout]) -> dict[str, Any]:
    first = members[0]
    ordered = sorted(enumerate(members), key=lambda item: (_number(item[1].get("session")) or 0, item[0]))
    return {
        "step": step,
        "row": clean(str(first["row_index"])) if "row_index" in first else "",
        "prompt": clean(str(first.get("input", ""))),
        "truth": clean(str(first.get("gts", ""))),
        "rollouts": [_rollout(place, rollout) for place, rollout in ordered],
    }


def _rollout(place: int, rollout: Rollout) -> list[Any]:
    text = str(rollout.get("output", ""))
    boundary = min(max(int(_number(rollout.get("prefix_chars")) or 0), 0), len(text))
    return [
        _number(rollout.get("session", place)),
        clean(str(rollout.get("role", "on_policy"))),
        _number(rollout.get("score")),
        _number(rollout.get("prefix_len", 0)),
        _number(rollout.get("demo_len", 0)),
        _number(rollout.get("prefix_ratio", 0)),
        int(rollout.get("hit_limit") is True),
        int(rollout.get("trained") is not False),
        *_parts(text, boundary, _spans(rollout.get("advantages"), len(text))),
    ]


def _spans(logged: Any, length: int) -> list[Span]:
    """(begin, end, advantage) of the rollout log's `advantages`; [] if they are not those of a text of that length."""
    try:
        ends, values = zip(*((int(end), float(value)) for end, value in logged), strict=True)
    except (TypeError, ValueError, OverflowError):
        return []
    if not all(map(math.isfinite, values)) or list(ends) != sorted(ends) or ends[0] < 0 or ends[-1] != length:
        return []
    return list(zip([0, *ends], ends, values, strict=False))


def _parts(text: str, boundary: int, spans: list[Span]) -> list[str | list[Any]]:
    """Prefix and rest of a rollout's text."""
    if not spans:
        return [clean(text[:boundary]), clean(text[boundary:])]
    return [_shaded(text, 0, boundary, spans), _shaded(text, boundary, len(text), spans)]


def _shaded(text: str, low: int, high: int, spans: list[Span]) -> list[Any]:
    kept = [(low, high)] if high - low <= HEAD + TAIL else [(low, low + HEAD), (high - TAIL, high)]
    parts: list[Any] = []
    for begin, end in kept:
        if begin > low:
            parts += [f" [... {begin - low - HEAD} characters ...] ", None]
        for first, last, advantage in spans:
            if part := text[max(first, begin) : min(last, end)]:
                parts += [_shown(part), _number(advantage)]
    return parts


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.5g}")


def clean(text: str) -> str:
    """`text`, shortened, with control and direction characters spelled out."""
    return _shown(elide(text, HEAD, TAIL))


def _shown(text: str) -> str:
    # isprintable() is False on every category that printable() escapes; far faster than looking at each character
    return text if text.replace("\n", "").replace("\t", "").isprintable() else printable(text)
