"""The numbers of an evaluation: `summary.json` and a table."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from verl_prefix.evaluation import estimators
from verl_prefix.evaluation.problems import Problem
from verl_prefix.terminal import printable


def planned(records: Iterable[Mapping[str, Any]], problems: Sequence[Problem] = ()) -> dict[str, tuple[int, int]]:
    """Problems and samples a problem of each data set: the most samples that any of its records' problems has.

    Args:
        problems: of the files, where they are known: those without a record are counted too.
    """
    per_problem = Counter((record["data_source"], record["problem"]) for record in records)
    sets: dict[str, list[int]] = {problem.data_source: [] for problem in problems}
    for (name, _), count in per_problem.items():
        sets.setdefault(name, []).append(count)
    in_files = Counter(problem.data_source for problem in problems)
    return {name: (max(len(counts), in_files[name]), max(counts, default=1)) for name, counts in sets.items()}


def summarise(
    records: Iterable[Mapping[str, Any]], plan: Mapping[str, tuple[int, int]], *, seed: int = 0
) -> dict[str, Any]:
    """Estimates per data set, and their mean over the sets of an ability where it has several.

    Args:
        records: graded samples; those with `error` must not be among them.
        plan: per data set its problems and samples a problem. What is missing of that is reported (`not_graded`) and is
            no part of any estimate.
    """
    by_set: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_set[record["data_source"]].append(record)
    sets: dict[str, dict[str, Any]] = {}
    means: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, (problems, n) in plan.items():
        graded = by_set.get(name, [])
        sets[name] = {"problems": problems, "n": n, "not_graded": problems * n - len(graded)}
        if graded:
            estimates, resampled = _of_set(graded, zlib.crc32(f"{seed} {name}".encode()))
            sets[name] |= estimates
            means[graded[0]["ability"]][name] = resampled
    several = {ability: sampled for ability, sampled in means.items() if ability and len(sampled) > 1}
    return {
        "sets": sets,
        "means": {
            ability: {
                "sets": list(sampled),
                **estimators.over_sets([sets[name]["avg"]["value"] for name in sampled], list(sampled.values())),
            }
            for ability, sampled in several.items()
        },
        "interval": f"{estimators.LEVEL:.0%} percentile bootstrap over problems, {estimators.RESAMPLES} resamples",
        "seed": seed,
    }


def _of_set(graded: list[Mapping[str, Any]], seed: int) -> tuple[dict[str, Any], Any]:
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for record in sorted(graded, key=lambda record: (record["problem"], record["sample"])):  # whatever came first
        outcomes[record["problem"]].append(record["correct"])
    estimates, resampled = estimators.of_set(list(outcomes.values()), seed=seed)
    cut = [record["finish_reason"] == "length" for record in graded if "finish_reason" in record]
    tokens = [record["response_tokens"] for record in graded if record.get("response_tokens") is not None]
    return {
        **estimates,
        "cut_share": sum(cut) / len(cut) if cut else None,
        "response_tokens": sum(tokens) / len(tokens) if tokens else None,
    }, resampled


def table(summary: Mapping[str, Any]) -> Table:
    """Rows: data sets, then means. Values in per cent with their interval."""
    found = Table("data set", "problems x n", "avg@n", "pass@n", "tokens", "cut", box=box.SIMPLE, padding=(0, 1, 0, 0))
    missing = any(of["not_graded"] for of in summary["sets"].values())
    if missing:
        found.add_column("not graded")
    for column in found.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for name, of in summary["sets"].items():
        highest = max((int(key[5:]) for key in of if key.startswith("pass@")), default=0)
        found.add_row(
            Text(printable(name)),
            f"{of['problems']:,} x {of['n']}",
            _percent(of.get("avg")),
            _percent(of.get(f"pass@{highest}"), "" if highest == of["n"] else f" @{highest}") if of["n"] > 1 else "",
            f"{of['response_tokens']:,.0f}" if of.get("response_tokens") is not None else "",
            f"{of['cut_share']:.1%}" if of.get("cut_share") is not None else "",
            *([str(of["not_graded"])] if missing else []),
        )
    for ability, mean in summary["means"].items():
        found.add_section()
        found.add_row(Text(f"mean of {len(mean['sets'])} ({printable(ability)})"), "", _percent(mean))
    return found


def _percent(estimate: Mapping[str, float] | None, suffix: str = "") -> Text:
    if estimate is None:
        return Text("-")
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return Text(f"{value:.1f} [{low:.1f}, {high:.1f}]{suffix}")
