"""What a run has written: verl's `file` logger (`metrics.jsonl`).

That logger overwrites its file when a run is resumed. The trainer therefore moves what is there to
`metrics.partN.jsonl` first, and every reader here takes the segments together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

#: verl's name of a validation accuracy: val-core/<data source>/acc/mean@<n>
ACCURACY = re.compile(r"val-core/(?P<source>.+)/acc/mean@\d+$")


def file_of(project: str, experiment: str) -> Path:
    """The file of verl's `file` logger (verl 0.9.1, `FileLogger`)."""
    named = os.environ.get("VERL_FILE_LOGGER_PATH")
    root = os.path.expanduser(os.environ.get("VERL_FILE_LOGGER_ROOT", "."))
    return Path(root, project, f"{experiment}.jsonl") if named is None else Path(named)


def set_aside(metrics_file: Path) -> None:
    """Make what is in the file a segment of its own: `metrics.partN.jsonl`, N one more than the last."""
    if metrics_file.exists() and metrics_file.stat().st_size:
        number = max(_set_aside(metrics_file), default=0) + 1
        metrics_file.rename(metrics_file.with_name(f"{metrics_file.stem}.part{number}{metrics_file.suffix}"))


def steps(metrics_file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each complete line of the run's segments; a line still being written is left for later.

    A resumed segment starts again at its checkpoint, so what an earlier one logged after that step is void.
    """
    found: dict[int, dict[str, float]] = {}
    for entries in segments(metrics_file):
        if entries:
            found = {step: metrics for step, metrics in found.items() if step <= entries[0][0]}
        for step, metrics in entries:
            found.setdefault(step, {}).update(metrics)
    yield from sorted(found.items())


def segments(metrics_file: Path) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """What each segment of the run has logged, one (step, metrics) a line."""
    aside = _set_aside(metrics_file)
    for file in [*(aside[n] for n in sorted(aside)), metrics_file]:
        yield list(_entries(file))


def _set_aside(metrics_file: Path) -> dict[int, Path]:
    name = re.compile(rf"{re.escape(metrics_file.stem)}\.part(\d+){re.escape(metrics_file.suffix)}")
    found = ((name.fullmatch(file.name), file) for file in metrics_file.parent.glob("*.part*"))
    return {int(match[1]): file for match, file in found if match}


def _entries(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    if not file.exists():
        return
    for line in file.read_bytes().splitlines():  # of bytes: a text has more line ends than JSON lines have
        try:
            entry = json.loads(line)
        except ValueError:  # being written, or torn by a full disk
            continue
        # what was NaN or infinite is null in the file
        yield int(entry["step"]), {name: value for name, value in entry["data"].items() if value is not None}


def accuracies(metrics_file: Path) -> dict[str, list[tuple[int, float]]]:
    """Validation accuracy over steps, per data source."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in steps(metrics_file):
        for name, value in metrics.items():
            if found := ACCURACY.match(name):
                curves.setdefault(found["source"], []).append((step, float(value)))
    return curves


def series(metrics_file: Path, name: str) -> list[tuple[int, float]]:
    """One metric over the steps that logged it."""
    return [(step, float(metrics[name])) for step, metrics in steps(metrics_file) if name in metrics]


def generated_tokens(metrics_file: Path) -> float:
    """Training tokens the policy itself generated: response tokens less prefix tokens."""
    return sum(tokens_of_step(values) for _, values in steps(metrics_file))


def tokens_of_step(values: Mapping[str, float]) -> float:
    """Tokens that the policy generated in one step, those of rollouts that a gate dropped included, from that step's
    metrics; 0 where it did not train."""
    if "prefix/generated_tokens" in values:
        return values["prefix/generated_tokens"] + values.get("gate/dropped_tokens", 0.0)
    # stock verl: its totals count the padding that fills a batch up, if there is any
    if "response_length/mean" not in values or "perf/total_num_tokens" not in values:
        return 0.0
    per_rollout = values["response_length/mean"] + values["prompt_length/mean"]
    return values["perf/total_num_tokens"] / per_rollout * values["response_length/mean"]
