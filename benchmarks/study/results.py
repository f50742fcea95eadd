"""Finished runs as tables and a figure:

    python -m benchmarks.study.results RESULTS --page README.md --page docs/comparison.md --picture docs/comparison.png

Which methods make a table is in methods.yaml. The page's blocks `<!-- table NAME -->` are filled in; a test compares
both pages with the results, so that neither can rot.

Every method at the end of its updates and, since methods differ in how much they generate, at the same number of
generated tokens: the least that any of the reinforcement-learning runs used (accuracy interpolated between checks).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console

from benchmarks.study import explore, tune
from benchmarks.study.run import METHODS, read_results
from benchmarks.study.tables import Table

TUNED = METHODS.with_name("tuning.jsonl")
#: tables that compare at the tokens after which their first method has this hard accuracy (mean of its seeds)
GOALS = {"fewer_tokens": 0.7}
#: tables of what was searched on the tuning seeds
SEARCHES = {
    "settings": lambda: tune.table(tune.read(TUNED), yaml.safe_load(tune.GRID.read_text())),
    "candidates": lambda: explore.table(tune.read(TUNED.with_name("candidates.jsonl"))),
}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->\n)", re.S)


def budget(results: list[dict[str, Any]]) -> int:
    """The fewest tokens that a run with rollouts generated."""
    used = [result["curve"][-1]["tokens"] for result in results]
    return min((tokens for tokens in used if tokens), default=0)


def tokens_until(results: list[dict[str, Any]], goal: float) -> int:
    """Generated tokens after which the mean hard accuracy of these runs is `goal`; all they have if it never is."""
    curves = [result["curve"] for result in results]
    tokens = np.linspace(0, min(curve[-1]["tokens"] for curve in curves), 10_001)
    reached = np.mean([at_tokens(curve, "hard", tokens) for curve in curves], axis=0) >= goal
    return int(tokens[reached.argmax()] if reached.any() else tokens[-1])


def at_tokens(curve: list[dict[str, Any]], kind: str, tokens: Any) -> Any:
    """Accuracy after `tokens` generated tokens; a method that generates fewer has its last."""
    return np.interp(tokens, [p["tokens"] for p in curve], [p[kind] for p in curve])


def rows(results: list[dict[str, Any]], equal: int) -> list[dict[str, Any]]:
    """One row a method: means over its seeds, with the range of hard accuracy; also after `equal` generated tokens."""
    made = []
    for method in sorted({result["method"] for result in results}):
        curves = [result["curve"] for result in results if result["method"] == method]
        last = {key: [curve[-1][key] for curve in curves] for key in ("easy", "hard", "updates", "tokens", "seconds")}
        made.append(
            {
                "method": method,
                "seeds": len(curves),
                **{key: float(np.mean(values)) for key, values in last.items()},
                "hard_range": (min(last["hard"]), max(last["hard"])),
                "easy_at": float(np.mean([at_tokens(curve, "easy", equal) for curve in curves])),
                "hard_at": float(np.mean([at_tokens(curve, "hard", equal) for curve in curves])),
            }
        )
    return sorted(made, key=lambda row: -row["hard"])


def methods_of(table: str) -> list[str]:
    """Of one table of methods.yaml; the first is what the others are compared with."""
    return yaml.safe_load(METHODS.read_text())["tables"][table]


def of_table(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The runs of one table of methods.yaml; of what the others are compared with only the seeds that they have."""
    first, *others = methods_of(name)
    chosen = [result for result in results if result["method"] in others]
    seeds = {result["seed"] for result in chosen}
    return [r for r in results if r["method"] == first and (not seeds or r["seed"] in seeds)] + chosen


def on_the_same_seeds(results: list[dict[str, Any]], method: str, other: str) -> str:
    """Mean last hard accuracy of `other` on the seeds of `method`; a dash if it lacks one of them."""
    seeds = {result["seed"] for result in results if result["method"] == method}
    last = {result["seed"]: result["curve"][-1]["hard"] for result in results if result["method"] == other}
    return f"{np.mean([last[seed] for seed in seeds]):.2f}" if seeds <= last.keys() else "–"


def fill(page: str, results: list[dict[str, Any]]) -> str:
    """`page` with a table in every block: of these results, or of what `tune` and `explore` have found."""

    def block(found: re.Match) -> str:
        if found[2] in SEARCHES:
            return f"{found[1]}{SEARCHES[found[2]]().markdown()}\n{found[3]}"
        chosen, equal = of_table(results, found[2]), None
        first = methods_of(found[2])[0]
        if found[2] in GOALS and any(result["method"] == first for result in chosen):
            equal = tokens_until([result for result in chosen if result["method"] == first], GOALS[found[2]])
        return f"{found[1]}{markdown(chosen, equal, first)}\n{found[3]}"

    return BLOCK.sub(block, page)


def markdown(results: list[dict[str, Any]], equal: int | None = None, first: str | None = None) -> str:
    """The table, as Markdown; `equal`: the tokens of its last column, by default `budget`; `first`: a method whose hard
    accuracy on the same seeds stands beside each other's."""
    equal = budget(results) if equal is None else equal
    head = ["method", "seeds", "easy", "hard (range)", *([f"`{first}`, same seeds"] if first else [])]
    head += ["updates", "generated tokens", "minutes of training", f"easy, hard at {equal / 1e6:.2f} M tokens"]
    lines = []
    for row in rows(results, equal):
        low, high = row["hard_range"]
        spread = f" ({low:.2f}-{high:.2f})" if row["seeds"] > 1 else ""
        cells = [f"`{row['method']}`", str(row["seeds"]), f"{row['easy']:.2f}", f"{row['hard']:.2f}{spread}"]
        cells += [on_the_same_seeds(results, row["method"], first)] if first else []
        cells += [f"{row['updates']:.0f}", f"{row['tokens'] / 1e6:.2f} M", f"{row['seconds'] / 60:.1f}"]
        lines.append([*cells, f"{row['easy_at']:.2f}, {row['hard_at']:.2f}"])
    return Table(head, lines).markdown()


def picture(results: list[dict[str, Any]], file: Path) -> None:
    """Hard and easy accuracy over updates, over generated tokens and over time; a band covers a method's seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = [row["method"] for row in rows(results, 0)]
    axes_of = (
        ("updates", 1, "updates"),
        ("tokens", 1e6, "generated tokens (M)"),
        ("seconds", 60, "minutes of training"),
    )
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), sharey=True, layout="constrained")
    colours = dict(zip(methods, plt.get_cmap("tab10").colors * 3, strict=False))
    for line, kind in enumerate(("hard", "easy")):
        for panel, (key, scale, label) in zip(panels[line], axes_of, strict=True):
            for method in methods:
                curves = [result["curve"] for result in results if result["method"] == method]
                longest = max(curves, key=lambda curve: curve[-1][key])
                x = np.array([point[key] for point in longest], float)
                y = np.array([np.interp(x, [p[key] for p in c], [p[kind] for p in c]) for c in curves])
                if x[-1] == 0:  # generates nothing
                    panel.plot([0], y.mean(0)[-1:], "o", color=colours[method], label=method, clip_on=False)
                    continue
                panel.plot(x / scale, y.mean(0), color=colours[method], label=method)
                panel.fill_between(x / scale, y.min(0), y.max(0), color=colours[method], alpha=0.15, linewidth=0)
            panel.set(
                xlabel=label, ylim=(0, 1), ylabel=f"{kind} problems, held-out accuracy" if key == "updates" else ""
            )
            panel.grid(alpha=0.3)
    panels[1][0].legend(fontsize=9, ncol=2, loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with METHOD_seedN.json.")],
    page: Annotated[list[Path] | None, typer.Option(help="Markdown page whose tables are to be filled in.")] = None,
    image: Annotated[Path | None, typer.Option("--picture", help="PNG to write: the table `comparison`.")] = None,
) -> None:
    """Print the table (Markdown) of all runs, fill in the tables of a page, draw the curves."""
    results = read_results(folder)
    if not results:
        raise typer.BadParameter(f"{folder}: no METHOD_seedN.json; recipes/compare_cpu.sh writes them.")
    Console(width=200).print(markdown(results), markup=False, highlight=False)
    for file in page or []:
        file.write_text(fill(file.read_text(), results))
    if image:
        picture(of_table(results, "comparison"), image)


if __name__ == "__main__":
    typer.run(main)
