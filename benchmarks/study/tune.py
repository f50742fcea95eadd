"""Find each method's settings on the stand-in: `python -m benchmarks.study.tune --testbeds DIR --out tuning.jsonl`.

Every point of the grid (grid.yaml) on the first tuning seed, a method's best three also on the second. A finished point
is a line of the output and is not run again; the table at the end names each method's choice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from benchmarks.study.tables import Table

GRID = Path(__file__).parent / "grid.yaml"
BEST = 3


def points(grid: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The settings of one method: learning rate x knob."""
    return [
        {"method": method, "lr": lr, "knob": value} for lr in grid["lr"] for value in grid["methods"][method]["values"]
    ]


def score(entry: dict[str, Any]) -> float:
    """What a setting is judged by: easy and hard accuracy, averaged over both and over the last two checks."""
    curve = entry["curve"]
    return sum(sum(curve[kind][-2:]) / len(curve[kind][-2:]) for kind in ("easy", "hard")) / 2


def composed(preset: str, seed: int, overrides: list[str]) -> Any:
    """verl's configuration of a run on the testbed."""
    import verl  # noqa: F401  the plugin
    from hydra import compose, initialize_config_module

    from benchmarks.study.standin import RESPONSE_LENGTH

    common = [f"+prefix={preset}", f"prefix.seed={seed}", f"data.max_response_length={RESPONSE_LENGTH}"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*common, "actor_rollout_ref.rollout.n=8", *overrides])


def run(testbed: Path, seed: int, grid: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """One run of the stand-in; its line of the output."""
    import torch

    from benchmarks.study.standin import StandIn

    torch.set_num_threads(1)
    spec, steps, begin = grid["methods"][point["method"]], grid["steps"], time.monotonic()
    knob, lr = {spec["knob"]: point["knob"]}, point["lr"]
    sft_steps = steps if "preset" not in spec else knob.pop("sft_steps", 0)
    sft_lr = spec.get("sft_lr", lr)
    standin = StandIn(testbed, seed, sft_lr if sft_steps else lr, weight_decay=knob.pop("weight_decay", 0.0))
    if sft_steps:
        standin.sft(sft_steps)
    if sft_steps < steps:
        standin.restart_optimizer(lr)
        overrides = [*spec.get("overrides", []), *(f"{key}={value}" for key, value in knob.items())]
        standin.rl(composed(spec["preset"], seed, overrides), steps - sft_steps)
    return {**point, "seed": seed, "curve": asdict(standin.curve), "seconds": round(time.monotonic() - begin, 1)}


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def key(entry: dict[str, Any]) -> tuple:
    return entry["method"], entry["lr"], entry["knob"], entry["seed"]


def mean_scores(entries: list[dict[str, Any]], method: str) -> list[tuple[float, int, dict[str, Any]]]:
    """(mean score, seeds, setting) of every setting of a method: those with the most seeds first, then by score."""
    scores: dict[tuple, list[float]] = {}
    for entry in entries:
        if entry["method"] == method:
            scores.setdefault((entry["lr"], entry["knob"]), []).append(score(entry))
    ranked = [(sum(s) / len(s), len(s), {"lr": lr, "knob": knob}) for (lr, knob), s in scores.items()]
    return sorted(ranked, key=lambda r: (-r[1], -r[0]))


def table(entries: list[dict[str, Any]], grid: dict[str, Any]) -> Table:
    """What was chosen for each method, with its score, and whether it lies at an end of what was tried."""
    rows = []
    for method, spec in grid["methods"].items():
        if not (ranked := mean_scores(entries, method)):
            continue
        value, seeds, chosen = ranked[0]
        ends = [name for name, of in (("lr", grid["lr"]), ("knob", spec["values"])) if chosen[name] in (of[0], of[-1])]
        knob, at_end = f"`{spec['knob']}` = {chosen['knob']:g}", ", ".join(ends).replace("lr", "learning rate")
        rows.append([f"`{method}`", f"{chosen['lr']:g}", knob, f"{value:.2f}", str(seeds), at_end])
    return Table(["method", "learning rate", "main knob", "score", "seeds", "at an end of the grid"], rows)


def main(
    testbeds: Annotated[Path, typer.Option(help="Folder for the testbeds, made where missing: seedN.")],
    out: Annotated[Path, typer.Option(help="JSON lines, one finished point each.")],
    grid_file: Annotated[Path, typer.Option("--grid", help="The grid.")] = GRID,
    seeds: Annotated[tuple[int, int], typer.Option(help="Tuning seeds, not to be reported.")] = (101, 102),
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all of the grid.")] = "",
) -> None:
    """Run what is missing, then print the choices."""
    grid, console = yaml.safe_load(grid_file.read_text()), Console()
    chosen = methods.split(",") if methods else list(grid["methods"])
    for seed in seeds:
        if not (testbeds / f"seed{seed}" / "model").exists():
            command = [sys.executable, "-m", "data_prep.testbed", "--out", testbeds / f"seed{seed}", "--seed", seed]
            subprocess.run([str(part) for part in command], check=True)
    for method in chosen:
        wanted = [(seeds[0], point) for point in points(grid, method)]
        for stage in range(2):
            done = {key(entry) for entry in read(out)}
            if stage:
                wanted = [(seeds[1], {"method": method, **s}) for _, _, s in _best(read(out), method, seeds[0])]
            for seed, point in wanted:
                if key({**point, "seed": seed}) in done:
                    continue
                entry = run(testbeds / f"seed{seed}", seed, grid, point)
                with out.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                last = {kind: entry["curve"][kind][-1] for kind in ("easy", "hard")}
                console.print(
                    f"{method} lr {point['lr']} knob {point['knob']} seed {seed}: {last} {entry['seconds']} s"
                )
    console.print(table(read(out), grid).rich())


def _best(entries: list[dict[str, Any]], method: str, seed: int) -> list[tuple[float, int, dict[str, Any]]]:
    return mean_scores([entry for entry in entries if entry["seed"] == seed], method)[:BEST]


if __name__ == "__main__":
    typer.run(main)
