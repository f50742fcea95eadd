"""Reading what a run has written: verl's `file` logger (`metrics.jsonl`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

#: verl's name of a validation accuracy: val-core/<data source>/acc/mean@<n>
ACCURACY = re.compile(r"val-core/(?P<source>.+)/acc/mean@\d+$")


def steps(metrics_file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) of each complete line. A line still being written is left for the next call."""
    if not metrics_file.exists():
        return
    for line in metrics_file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return
        yield int(entry["step"]), entry["data"]


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
    tokens = 0.0
    for _, values in steps(metrics_file):
        if "response_length/mean" in values and "perf/total_num_tokens" in values:
            per_rollout = values["response_length/mean"] + values["prompt_length/mean"]
            responses = values["perf/total_num_tokens"] / per_rollout * values["response_length/mean"]
            tokens += responses * (1 - values.get("prefix/token_share", 0.0))
    return tokens
