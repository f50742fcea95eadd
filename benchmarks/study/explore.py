"""Try settings of this project's axes on the stand-in: `python -m benchmarks.study.explore --testbeds DIR`.

Every candidate of candidates.yaml, on its seeds; a finished one is a line of candidates.jsonl and is not run again. The
table has the accuracy after as many generated tokens as the published setting needs for 0.7 on hard problems.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console

from benchmarks.study.tables import Table
from benchmarks.study.tune import composed, read

FOLDER = Path(__file__).parent
PUBLISHED, GOAL = "published", 0.7


def run(testbed: Path, seed: int, candidate: dict[str, Any]) -> dict[str, Any]:
    """One run of the stand-in; its curve."""
    import torch

    from benchmarks.study.standin import StandIn

    torch.set_num_threads(1)
    standin = StandIn(testbed, seed, candidate["lr"])
    standin.rl(composed("prefix_rft", seed, candidate["overrides"]), candidate["steps"])
    return asdict(standin.curve)


def budget(entries: list[dict[str, Any]]) -> float:
    """Generated tokens at which the published setting's mean hard accuracy reaches the goal."""
    curves = [entry["curve"] for entry in entries if entry["name"] == PUBLISHED]
    tokens = np.linspace(0, min(curve["tokens"][-1] for curve in curves), 1000)
    mean = np.mean([np.interp(tokens, curve["tokens"], curve["hard"]) for curve in curves], axis=0)
    if mean.max() < GOAL:
        raise typer.BadParameter(
            f"{PUBLISHED} reaches {mean.max():.2f} on hard problems, not {GOAL}; give it more steps."
        )
    return float(tokens[np.argmax(mean >= GOAL)])


def at(entry: dict[str, Any], kind: str, tokens: float) -> float:
    return float(np.interp(tokens, entry["curve"]["tokens"], entry["curve"][kind]))


def table(entries: list[dict[str, Any]]) -> Table:
    """Every candidate at the budget: means over its seeds, hard accuracy also seed by seed."""
    tokens = budget(entries)
    head = ["candidate", "lr", "updates", f"hard at {tokens / 1e6:.2f} M tokens", "by seed", "easy", "overrides"]
    ranked = []
    for name in dict.fromkeys(entry["name"] for entry in entries):
        own = [entry for entry in entries if entry["name"] == name]
        hard = {entry["seed"]: at(entry, "hard", tokens) for entry in own}
        easy = float(np.mean([at(entry, "easy", tokens) for entry in own]))
        ranked.append((len(hard), float(np.mean(list(hard.values()))), name, own[0], hard, easy))
    rows = []
    for _, mean, name, entry, hard, easy in sorted(ranked, key=lambda row: (-row[0], -row[1])):
        by_seed = ", ".join(f"{seed}: {value:.2f}" for seed, value in sorted(hard.items()))
        rows.append([f"`{name}`", f"{entry['lr']:g}", str(entry["steps"]), f"{mean:.2f}", by_seed, f"{easy:.2f}"])
        rows[-1].append(" ".join(f"`{override}`" for override in entry["overrides"]))
    return Table(head, rows)


def main(
    testbeds: Annotated[Path, typer.Option(help="Folder with testbeds, seedN (benchmarks.study.tune makes them).")],
    file: Annotated[Path, typer.Option("--candidates", help="The candidates.")] = FOLDER / "candidates.yaml",
    out: Annotated[Path, typer.Option(help="JSON lines, one finished run each.")] = FOLDER / "candidates.jsonl",
) -> None:
    """Run what is missing, then print the table."""
    console = Console()
    for name, candidate in yaml.safe_load(file.read_text()).items():
        for seed in candidate.pop("seeds"):
            if any((entry["name"], entry["seed"]) == (name, seed) for entry in read(out)):
                continue
            begin = time.monotonic()
            entry = {"name": name, "seed": seed, **candidate, "curve": run(testbeds / f"seed{seed}", seed, candidate)}
            entry["seconds"] = round(time.monotonic() - begin, 1)
            with out.open("a") as lines:
                lines.write(json.dumps(entry) + "\n")
            console.print(f"{name}, seed {seed}: hard {entry['curve']['hard'][-1]:.2f}, {entry['seconds']} s")
    console.print(table(read(out)).rich())


if __name__ == "__main__":
    typer.run(main)
