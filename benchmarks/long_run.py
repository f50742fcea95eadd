"""Memory over a long CPU run: does any process grow?

    python -m benchmarks.long_run --testbed runs/quickstart/testbed_seed0 --out runs/long --steps 1000

Every few seconds the memory that each process has for itself (USS) is noted with the step that the run has reached. At
the end: a table and a picture of the medians after warm-up and at the end. USS leaves shared memory out (Ray's object
store). Exit code 1 if driver, task runner (verl's trainer), training worker, agent loop, reward worker or grader grew
by more than 5 % or was never seen, if the rollout log does not hold the steps it was asked to keep, or if the report
has no rollouts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.kill_and_resume import VICTIMS, Processes, last_step, start

KINDS = {
    **VICTIMS,
    "reward worker": "ray::RewardLoopWorker",
    "grader": "verl_prefix.grading",
    "vLLM worker": "VLLM::Worker",
    "TransferQueue": "ray::TransferQueueController",
    "TransferQueue's store": "ray::SimpleStorageUnit",
}
#: what must not grow: the rest is Ray's, vLLM's and TransferQueue's
OURS = ("driver", "task runner", "training worker", "agent loop", "reward worker", "grader")
LIMIT, KEPT = 0.05, 100

console = Console(highlight=False)


def memory(processes: Processes) -> dict[str, float]:
    """MB by kind of process."""
    found: dict[str, float] = defaultdict(float)
    for process in processes.look():
        try:
            command = " ".join(process.cmdline())
            kind = next((kind for kind, part in KINDS.items() if part in command), None)
            if kind:
                found[kind] += process.memory_full_info().uss / 2**20
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def growth(samples: list[dict[str, Any]], kind: str, warm_up: int) -> tuple[float, float]:
    """Median MB in the `warm_up` steps after as many steps, and in the last ones."""
    last = max(sample["step"] for sample in samples)
    windows = ((warm_up, 2 * warm_up), (last - warm_up, last))
    first, end = (
        statistics.median(s["memory"][kind] for s in samples if low <= s["step"] <= high and kind in s["memory"])
        for low, high in windows
    )
    return first, end


def content(report: Path) -> dict[str, Any]:
    """The data of a report's page."""
    return json.loads(report.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0])


def picture(samples: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind in KINDS:
        points = [(sample["step"], sample["memory"][kind]) for sample in samples if kind in sample["memory"]]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, linewidth=2 if kind in OURS else 1)
    axes.set(xlabel="step", ylabel="memory of its own (USS), MB", ylim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main(
    testbed: Annotated[Path, typer.Option(help="Made by `python -m data_prep.testbed`.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    steps: Annotated[int, typer.Option(min=20)] = 1000,
    warm_up: Annotated[int, typer.Option(help="Steps before the first window, and of each window.", min=1)] = 100,
    every: Annotated[float, typer.Option(help="Seconds between two samples.")] = 10.0,
) -> None:
    """Run, watch, compare."""
    if steps < 3 * warm_up:
        raise typer.BadParameter(f"--steps {steps} leaves no room for warm-up and two windows of {warm_up} steps.")
    testbed, out = testbed.resolve(), out.resolve()
    if (out / "run").exists():
        raise typer.BadParameter(f"{out} has a run already; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    run, record, samples = out / "run", out / "memory.jsonl", []
    more = (f"prefix.monitor.rollout_log_steps={KEPT}", "trainer.save_freq=100")
    process = start(testbed, run, steps, *more, "reward.custom_reward_function.path=pkg://verl_prefix.reward")
    processes = Processes(process.pid)
    try:
        with record.open("w") as lines:
            while process.poll() is None:
                time.sleep(every)
                sample = {"step": last_step(run), "memory": memory(processes)}
                if sample["memory"]:
                    samples.append(sample)
                    print(json.dumps(sample), file=lines, flush=True)
                    console.print(f"step {sample['step']}/{steps}", end="\r")
    finally:
        processes.stop()
    if process.returncode:
        raise typer.BadParameter(f"{run} did not run to its end: see {run}.out.")
    between = samples[-1]["step"] - 2 * warm_up  # from the middle of one window to that of the other
    head = (f"MB at steps {warm_up}-{2 * warm_up}", f"MB in the last {warm_up}", "growth", "kB a step")
    grown, table = [], Table("process", *head)
    for kind in KINDS:
        if not any(kind in sample["memory"] for sample in samples):
            grown += [kind] * (kind in OURS)
            table.add_row(kind, "never seen")
        else:
            first, end = growth(samples, kind, warm_up)
            slope = (end - first) * 1024 / between
            table.add_row(kind, f"{first:.0f}", f"{end:.0f}", f"{end / first - 1:+.1%}", f"{slope:+.1f}")
            if kind in OURS and end > first * (1 + LIMIT):
                grown.append(kind)
    console.print(table)
    picture(samples, out / "memory.png")
    kept = len(list((run / "rollouts").glob("*.jsonl")))
    report = out / "report.html"
    subprocess.run([Path(sys.executable).with_name("verl-prefix"), "report", run, "--out", report], check=True)
    groups = len(content(report)["groups"])
    console.print(f"rollout log: {kept} of {steps} steps kept | report: {groups} groups | samples {record}")
    raise typer.Exit(bool(grown or kept != min(KEPT, steps) or not groups))


if __name__ == "__main__":
    typer.run(main)
