"""The commands `verl-prefix compare` and `verl-prefix report`: what runs have reached, as a table and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from verl_prefix import comparison, learning_curves
from verl_prefix.exceptions import RunFolderError

RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUN...", exists=True, file_okay=False, help="Run folders (METHOD_seedN).")
]


def compare(
    runs: RunFolders,
    as_json: Annotated[bool, typer.Option("--json", help="The table as JSON on stdout.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write the learning curves to this PNG.")] = None,
) -> None:
    """Held-out accuracy at the start, at the end and at best, and what it cost; seeds of a method together."""
    found_runs = _runs(runs)
    found = [result for run in found_runs for result in comparison.results(run)]
    console = Console(stderr=as_json)
    if as_json:
        print(json.dumps(comparison.as_json(found), indent=2))
    elif found:
        console.print(comparison.table(found, console.width))
        area = "area: mean accuracy over the steps. " if console.width >= comparison.WIDE else ""
        console.print(
            f"{area}M tokens: millions that the policy itself generated in training, "
            "prefixes not counted. hours: training steps, validation not counted."
        )
    silent = [run.name for run in found_runs if run.name not in {result.run for result in found}]
    if silent:
        console.print(f"No validation logged yet: {', '.join(silent)}", markup=False, highlight=False)
    if picture is not None:
        learning_curves.draw({run.name: run.metrics for run in found_runs}, picture)
        console.print(f"picture {picture}", markup=False, highlight=False)


def report(
    runs: RunFolders,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    budget_mb: Annotated[float, typer.Option(min=1, help="Size limit of the file in MB; rollouts are sampled.")] = 20,
) -> None:
    """One HTML file, readable without a network: curves, rollouts and configuration differences of the runs."""
    from verl_prefix.report import page

    console = Console()
    found = _runs(runs)
    with console.status("reading"):
        html, kept = page.build(found, int(budget_mb * 1e6))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    console.print(f"{out} ({len(html) / 1e6:.1f} MB). {kept}", markup=False, highlight=False)


def _runs(folders: list[Path]) -> list[comparison.Run]:
    try:
        return comparison.find_runs(folders)
    except RunFolderError as error:
        raise typer.BadParameter(str(error)) from None
