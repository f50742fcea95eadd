"""Runs side by side: what each reached, what it cost, and the seeds of a method taken together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from verl_prefix import run_log
from verl_prefix.exceptions import RunFolderError
from verl_prefix.terminal import printable

_SEED = re.compile(r"(?P<method>.+)_seed(?P<seed>\d+)$")
_TRAINED = "actor/grad_norm"


@dataclass(frozen=True)
class Run:
    """A run folder (`metrics.jsonl`, `rollouts/`, `hydra/`). Folders named METHOD_seedN are seeds of one method."""

    folder: Path
    name: str
    method: str
    seed: int | None

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


@dataclass(frozen=True)
class Result:
    """One run on one set of held-out problems.

    `area` is the mean accuracy over the steps (trapezoids); `generated_tokens` leave prefixes out; `hours` are those of
    training steps, validation not counted; `updates` is None where the run's configuration is not there.
    """

    run: str
    method: str
    seed: int | None
    source: str
    first: float
    last: float
    best: float
    best_step: int
    area: float
    steps: int
    updates: int | None
    generated_tokens: float
    hours: float


#: what is averaged over the seeds of a method
MEASURES = ("first", "last", "best", "area", "steps", "updates", "generated_tokens", "hours")


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the order given. A name that occurs twice gets as many parent folders as tell it apart.

    A folder without metrics stands for its subfolder `rl` if that has some: `recipes/compare_cpu.sh` writes the phases
    of a run so.

    Raises RunFolderError on a folder without metrics and on one given twice.
    """
    folders = [folder.resolve() for folder in folders]
    given, folders = folders, [_with_metrics(folder) for folder in folders]
    for folder in folders:
        if not _has_metrics(folder):
            raise RunFolderError(
                f"{folder}: no metrics.jsonl. Give a run's folder; verl writes the file with "
                "trainer.logger=[console,file] and VERL_FILE_LOGGER_PATH=RUN/metrics.jsonl "
                "(recipes/testbed_cpu.sh)."
            )
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise RunFolderError(f"{min(twice)}: given twice. Name each run once.")
    runs = []
    for folder, name in zip(folders, _names(given), strict=True):
        found = _SEED.match(name)
        runs.append(
            Run(folder, name, found["method"] if found else name, int(found["seed"]) if found else None),
        )
    return runs


def _has_metrics(folder: Path) -> bool:
    return any(folder.glob("metrics*.jsonl"))


def _with_metrics(folder: Path) -> Path:
    return folder / "rl" if not _has_metrics(folder) and _has_metrics(folder / "rl") else folder


def _names(folders: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def results(run: Run) -> list[Result]:
    """One entry per set of held-out problems, by name; none if the run has not validated yet."""
    entries = list(run_log.steps(run.metrics))
    per_step = updates_per_step(configuration(run))
    trained = sum(_TRAINED in values for _, values in entries)
    cost = {
        "steps": max((step for step, _ in entries), default=0),
        "updates": None if per_step is None else trained * per_step,
        "generated_tokens": sum(run_log.tokens_of_step(values) for _, values in entries),
        "hours": sum(values.get("timing_s/step", 0.0) for _, values in entries) / 3600,
    }
    found = []
    for source, curve in sorted(run_log.accuracies(run.metrics).items()):
        best_step, best = max(curve, key=lambda point: point[1])
        found.append(
            Result(
                run=run.name,
                method=run.method,
                seed=run.seed,
                source=source,
                first=curve[0][1],
                last=curve[-1][1],
                best=best,
                best_step=best_step,
                area=area(curve),
                **cost,
            )
        )
    return found


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Area under a curve of (step, value), divided by the steps it spans: the mean value over the run."""
    span = curve[-1][0] - curve[0][0]
    if span == 0:
        return curve[0][1]
    pairs = zip(curve, curve[1:], strict=False)
    return math.fsum((b - a) * (y + z) / 2 for (a, y), (b, z) in pairs) / span


def configuration(run: Run) -> dict[str, Any] | None:
    """The composed configuration of a run (`hydra/.hydra/config.yaml`), None if it is not there."""
    file = run.folder / "hydra" / ".hydra" / "config.yaml"
    if not file.is_file():
        return None
    try:
        found = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise RunFolderError(f"{file}: not readable as YAML ({error}). Mend or remove the file.") from error
    return found if isinstance(found, dict) else None


def updates_per_step(config: dict[str, Any] | None) -> int | None:
    """Optimiser updates in one training step: mini-batches times epochs."""
    try:
        actor = config["actor_rollout_ref"]["actor"]
        return math.ceil(config["data"]["train_batch_size"] / actor["ppo_mini_batch_size"]) * actor["ppo_epochs"]
    except (KeyError, TypeError):
        return None


def over_seeds(found: Sequence[Result]) -> list[dict[str, Any]]:
    """Per method and problems: `seeds`, and for each of MEASURES its `mean`, `min` and `max` over the runs.

    A measure that a run lacks is None for the method.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in found:
        groups.setdefault((result.method, result.source), []).append(result)
    summary = []
    for (method, source), members in groups.items():
        entry: dict[str, Any] = {"method": method, "source": source, "seeds": [member.seed for member in members]}
        for measure in MEASURES:
            values = [getattr(member, measure) for member in members]
            known = None not in values
            entry[measure] = (
                {"mean": math.fsum(values) / len(values), "min": min(values), "max": max(values)} if known else None
            )
        summary.append(entry)
    return summary


def as_json(found: Sequence[Result]) -> dict[str, Any]:
    """{"runs": one entry per run and problems, "methods": the same over seeds}."""
    return {"runs": [asdict(result) for result in found], "methods": over_seeds(found)}


_FORMATS = {
    "first": "{:.2f}",
    "last": "{:.2f}",
    "best": "{:.2f}",
    "area": "{:.2f}",
    "steps": "{:.0f}",
    "updates": "{:.0f}",
    "generated_tokens": "{:.2f}",
    "hours": "{:.2f}",
}
_HEADINGS = {"generated_tokens": "M tokens"}


WIDE = 100
_LEFT_OUT_WHEN_NARROW = ("area", "updates")


def table(found: Sequence[Result], width: int = WIDE) -> Table:
    """One row per run and problems; below the seeds of a method their mean and range.

    In a terminal of less than 100 characters without the columns that tell least.
    """
    measures = [measure for measure in MEASURES if width >= WIDE or measure not in _LEFT_OUT_WHEN_NARROW]
    shown = Table(title="Held-out accuracy, without prefixes", box=None, padding=(0, 1))
    for column in ("run", "problems"):
        shown.add_column(column, overflow="fold")
    for measure in measures:
        shown.add_column(_HEADINGS.get(measure, measure), justify="right", no_wrap=True)
        if measure == "best":
            shown.add_column("at", justify="right", no_wrap=True)
    for entry in over_seeds(found):
        members = [r for r in found if (r.method, r.source) == (entry["method"], entry["source"])]
        for result in members:
            cells = {measure: _cell(measure, getattr(result, measure)) for measure in measures}
            _add(shown, result.run, result.source, cells, str(result.best_step), "")
        if len(members) > 1:
            label = f"{entry['method']}, {len(members)} seeds"
            means = {m: _cell(m, entry[m] and entry[m]["mean"]) for m in measures}
            ranges = {m: _range(m, entry[m]) for m in measures}
            _add(shown, f"{label}: mean", entry["source"], means, "", "bold")
            _add(shown, f"{label}: range", entry["source"], ranges, "", "dim")
    return shown


def _add(shown: Table, label: str, source: str, cells: dict[str, str], best_step: str, style: str) -> None:
    values = []
    for measure, cell in cells.items():
        values.append(cell)
        if measure == "best":
            values.append(best_step)
    shown.add_row(Text(printable(label)), Text(printable(source)), *values, style=style)


def _range(measure: str, entry: dict[str, float] | None) -> str:
    if entry is None:
        return "-"
    ends = [_cell(measure, entry[end]) for end in ("min", "max")]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return _FORMATS[measure].format(value / 1e6 if measure == "generated_tokens" else value)
