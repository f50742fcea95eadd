"""The command `verl-prefix doctor`: is this environment fit for a run?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_prefix import doctor
from verl_prefix.terminal import printable

_STYLES = {doctor.OK: "green", doctor.WARNING: "yellow", doctor.ERROR: "bold red"}


def command(
    file: Annotated[Path | None, typer.Option(help="Training file to check, too.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Model folder or hub id, to tokenise the file with.")] = None,
    response_length: Annotated[int, typer.Option(min=2, help="data.max_response_length.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of findings on stdout.")] = False,
) -> None:
    """Check versions, plugin, Hydra group, device, Ray, vLLM, disk, memory and a data file. Exit code 1 on errors.

    Starts no cluster and no training; takes about as long as importing verl and vLLM.
    """
    checks = doctor.environment_checks()
    if file is not None:
        checks.append(doctor.data_check(str(file), tokenizer, response_length))
    errors = Console(stderr=True)
    with errors.status("looking"):
        found = doctor.findings(checks)
    if as_json:
        print(json.dumps([finding.as_dict() for finding in found], indent=2))
    else:
        _show(Console(), found)
    raise typer.Exit(doctor.exit_code(found))


def _show(console: Console, found: list[doctor.Finding]) -> None:
    table = Table(box=None, padding=(0, 1))
    for name in ("", "check", "found"):
        table.add_column(name, overflow="fold")
    for finding in found:
        style = _STYLES[finding.level]
        what = Text(printable(finding.what))
        if finding.mend:
            what.append(f"\n{printable(finding.mend)}", style="italic")
        table.add_row(Text(finding.level, style=style), Text(printable(finding.check)), what)
    console.print(table)
    counts = {level: sum(finding.level == level for finding in found) for level in _STYLES}
    console.print(", ".join(f"{count} {level}" for level, count in counts.items()), highlight=False)
