"""The command `verl-prefix`: look at a run while it goes on and after it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from verl_prefix import learning_curves, run_log

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console()

_TAIL_LINES = 40


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Folder with metrics.jsonl and console.log.")],
    steps: Annotated[int, typer.Option(help="Number of training steps of the run.")],
    pid: Annotated[int, typer.Option(help="Process to watch; its end ends the watching.")],
) -> None:
    """Follow a training run: its plugin lines, a progress bar, and each validation as it comes."""
    metrics, log = run / "metrics.jsonl", run / "console.log"
    shown_lines, shown_step, last_step = 0, -1, 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("starting Ray, FSDP2 and vLLM (1 to 2 min)", total=steps)
        alive = True
        while alive:
            alive = _alive(pid)
            lines = [line for line in _lines(log) if line.startswith("[verl_prefix")]
            for line in lines[shown_lines:]:
                console.print(line, style="dim", highlight=False, markup=False)
            shown_lines = max(shown_lines, len(lines))
            for step, values in run_log.steps(metrics):
                if step > shown_step:
                    shown_step = step
                    last_step = max(last_step, step)
                    _print_validation(step, values)
                    progress.update(task, completed=step, description=_describe(values) or "training")
            if alive:
                time.sleep(1.0)
    if last_step < steps:
        console.print(f"[red]The run ended at step {last_step} of {steps}.[/red] Last lines of {log}:")
        for line in _lines(log)[-_TAIL_LINES:]:
            console.print(line[:300], highlight=False, markup=False)
        raise typer.Exit(1)


@app.command()
def summary(
    metrics: Annotated[list[Path], typer.Argument(help="metrics.jsonl of one or more runs.")],
    picture: Annotated[Path | None, typer.Option(help="Write the learning curves to this PNG.")] = None,
) -> None:
    """Held-out accuracy at the start, at the end and at best, cost, and a picture."""
    runs = {file.parent.name: file for file in metrics}
    table = Table(title="Held-out accuracy, without prefixes", box=None, padding=(0, 1))
    for column in ("run", "problems", "first", "last", "best", "at", "steps", "s/step", "M tokens"):
        text = column in ("run", "problems")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    for label, file in runs.items():
        step_seconds = sorted(value for _, value in run_log.series(file, "timing_s/step"))
        generated = run_log.generated_tokens(file)
        for source, curve in sorted(run_log.accuracies(file).items()):
            best_step, best = max(curve, key=lambda point: point[1])
            median = f"{step_seconds[len(step_seconds) // 2]:.1f}" if step_seconds else "-"
            table.add_row(
                label,
                source,
                f"{curve[0][1]:.2f}",
                f"{curve[-1][1]:.2f}",
                f"{best:.2f}",
                str(best_step),
                str(curve[-1][0]),
                median,
                f"{generated / 1e6:.2f}",
            )
    console.print(table)
    console.print("M tokens: millions of tokens the policy itself generated in training, prefixes not counted.")
    if picture is not None:
        learning_curves.draw(runs, picture)
        console.print(f"picture {picture}")


def _print_validation(step: int, values: dict[str, float]) -> None:
    found = {match["source"]: value for name, value in values.items() if (match := run_log.ACCURACY.match(name))}
    if found:
        console.print(
            f"step {step:>4}  " + "  ".join(f"{source} {value:.2f}" for source, value in sorted(found.items()))
        )


def _describe(values: dict[str, float]) -> str:
    parts = []
    for name, text in (("prefixed/reward", "prefixed"), ("on_policy/reward", "on-policy")):
        if name in values:
            parts.append(f"{text} {values[name]:.2f}")
    return "reward " + ", ".join(parts) if parts else ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.exists() else []


if __name__ == "__main__":
    app()
