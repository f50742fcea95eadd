"""Kill a CPU run again and again, start it with the same command, and compare it with one that was left alone.

    python benchmarks/kill_and_resume.py --testbed runs/quickstart/testbed_seed0 --out runs/kills

The process to be killed (SIGKILL) takes turns: driver, task runner, training worker, rollout server, vLLM's engine,
agent loop, Ray's head. The moment is random: some seconds into the start, or some steps after the run has gone on. A
run that does not end by itself within --grace seconds counts as hung; all of it is then stopped, as a user would do.

At the end: one line per kill, and what differs from the run that was left alone: rows, prefixes, lines of the rollout
log, steps of the metrics. And whether each resumed segment went on with the weights of its checkpoint: the entropy of
the prefix tokens at a step that two segments have taken depends on weights and prefixes alone. Exit code 1 if anything
differs. All processes of a killed run are stopped before it is started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from verl_prefix import run_log

ROOT = Path(__file__).resolve().parents[1]
#: what is killed -> how its command line begins or what it contains
VICTIMS = {
    "driver": "verl.trainer.main_ppo",
    "task runner": "ray::TaskRunner",
    "training worker": "ray::WorkerDict",
    "rollout server": "ray::CPUHttpServer",
    "vLLM engine": "VLLM::EngineCore",
    "agent loop": "ray::AgentLoopWorker",
    "Ray head": "gcs_server",
}
PROMPTS, ROLLOUTS, SAVE_EVERY = 8, 4, 2
#: of a step that was taken again: a function of weights and prefixes, and how far float32 may move it
REPEATED, TOLERANCE = "prefix/prefix_entropy", 1e-4
DRAWN = ("row_index", "session", "demo_index", "prefix_len", "prefix_ids")

console = Console(highlight=False)


class Processes:
    """Everything that a run has started, also what its death has left without a parent."""

    def __init__(self, root: int):
        self._root, self._seen = psutil.Process(root), {}

    def look(self) -> list[psutil.Process]:
        """Those alive."""
        for process in [self._root, *self._seen.values()]:
            try:
                self._seen |= {(child.pid, child.create_time()): child for child in process.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        return [process for process in self._seen.values() if _alive(process)]

    def kill(self, kind: str) -> bool:
        """One process of that kind, if there is one."""
        for process in self.look():
            with contextlib.suppress(psutil.NoSuchProcess):
                if VICTIMS[kind] in " ".join(process.cmdline()):
                    process.kill()
                    return True
        return False

    def stop(self) -> None:
        while alive := self.look():
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=10)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return False


def start(testbed: Path, run: Path, steps: int, *overrides: str) -> subprocess.Popen:
    command = ["bash", "recipes/testbed_cpu.sh", "prefix_rft", testbed, run, steps, 0]
    command += [f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}"]
    command += [f"actor_rollout_ref.rollout.n={ROLLOUTS}", "trainer.val_before_train=false", "trainer.test_freq=-1"]
    command += [f"trainer.save_freq={SAVE_EVERY}", "trainer.max_actor_ckpt_to_keep=2", "trainer.resume_mode=auto"]
    command += overrides
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    out = (run.parent / f"{run.name}.out").open("a")
    environment = {**os.environ, "PATH": path}
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment, stdout=out, stderr=out)


def last_step(run: Path) -> int:
    return max((step for step, _ in run_log.steps(run / "metrics.jsonl")), default=0)


def last_step_since_start(run: Path) -> int:
    *_, newest = run_log.segments(run / "metrics.jsonl")
    return max((step for step, _ in newest), default=0)


def checkpoint(run: Path) -> int:
    noted = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    text = noted.read_text() if noted.exists() else ""
    return int(text) if text else 0


def segments(run: Path) -> int:
    """How often the run has been resumed and has got as far as its loop."""
    return len(list(run_log.segments(run / "metrics.jsonl"))) - 1


def kill_once(testbed: Path, run: Path, steps: int, kind: str, rng: random.Random, grace: float) -> dict[str, Any]:
    """Start the run, kill one process of it, wait for its end. `{}` if it had finished before."""
    began, saved, metrics = time.monotonic(), checkpoint(run), run / "metrics.jsonl"
    before = segments(run) + bool(metrics.exists() and metrics.stat().st_size)
    process = start(testbed, run, steps)
    processes = Processes(process.pid)
    early = rng.random() < 0.2
    after = rng.uniform(20, 60) if early else rng.uniform(0, 3)
    wanted = saved + rng.randint(1, 2 * SAVE_EVERY)
    ready = None
    while True:
        processes.look()
        if process.poll() is not None:
            processes.stop()
            if process.returncode and last_step(run) < steps:
                raise typer.BadParameter(f"the run did not come up again after the kill before: see {run}.out.")
            return {}
        begun = segments(run) >= before  # the newest segment is of this start
        if ready is None and (early or (begun and last_step_since_start(run) >= wanted)):
            ready = time.monotonic()
        at = last_step(run)
        if ready is not None and time.monotonic() - ready >= after and processes.kill(kind):
            break
        time.sleep(0.5)
    killed = time.monotonic()
    while process.poll() is None and time.monotonic() - killed < grace:
        processes.look()
        time.sleep(0.5)
    ended = None if process.poll() is None else round(time.monotonic() - killed, 1)
    left = len(processes.look())
    process.kill()
    process.wait()
    processes.stop()
    seconds = round(killed - began, 1)
    return {"killed": kind, "seconds": seconds, "step": at, "checkpoint": checkpoint(run), "ended": ended, "left": left}


def rollouts(run: Path) -> dict[int, list[dict]]:
    """By step; a torn line is an empty rollout."""

    def read(line: bytes) -> dict:
        try:
            return json.loads(line)
        except ValueError:
            return {}

    return {int(f.stem): list(map(read, f.read_bytes().splitlines())) for f in (run / "rollouts").glob("*.jsonl")}


def repeated(run: Path) -> Iterable[tuple[int, float, float]]:
    """(step, before, again): REPEATED of the first step of a resumed segment, where the one before had taken it too."""
    earlier: dict[int, dict[str, float]] = {}
    for entries in run_log.segments(run / "metrics.jsonl"):
        trained = [(step, values) for step, values in entries if REPEATED in values]
        if trained and trained[0][0] in earlier:
            step, values = trained[0]
            yield step, earlier[step][REPEATED], values[REPEATED]
        earlier = dict(trained) or earlier


def _drawn(lines: list[dict]) -> list[str]:
    return sorted(json.dumps([line.get(key) for key in DRAWN]) for line in lines)


def missing_metrics(run: Path, steps: int) -> list[int]:
    logged = {step for step, values in run_log.steps(run / "metrics.jsonl") if "actor/grad_norm" in values}
    return sorted(set(range(1, steps + 1)) - logged)


def differences(run: Path, alone: Path, steps: int, resumed: Iterable[int] = ()) -> Iterable[str]:
    """What a run that was killed has other than one that was not. The metrics of the checkpoints that it was resumed
    from may be missing: verl logs them after the checkpoint (docs/limits.md)."""
    mine, other = rollouts(run), rollouts(alone)
    for step in range(1, steps + 1):
        lines = mine.get(step, [])
        kept = {line.get("uid") for line in lines}
        if len(lines) != PROMPTS * ROLLOUTS or len(kept) != len(lines) or None in kept:
            yield f"step {step}: {len(lines)} lines in the rollout log, {len(kept - {None})} rollouts"
        if _drawn(lines) != _drawn(other[step]):
            yield f"step {step}: other rows or prefixes"
    if spare := set(mine) - set(range(1, steps + 1)):
        yield f"rollouts of steps {sorted(spare)}"
    if missing := set(missing_metrics(run, steps)) - set(resumed):
        yield f"no metrics of steps {sorted(missing)}"
    for step, before, again in repeated(run):
        if abs(before - again) > TOLERANCE:
            yield f"step {step}: prefix entropy {before:.6f} before the kill, {again:.6f} after it"


def main(
    testbed: Annotated[Path, typer.Option(help="Made by `python -m data_prep.testbed`.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder to write to; a second call goes on with it.")],
    kills: Annotated[int, typer.Option(min=1)] = 21,
    steps: Annotated[int, typer.Option(help="Of the run; enough that it is not over before the last kill.")] = 140,
    seed: Annotated[int, typer.Option(help="Of victims' moments.")] = 0,
    grace: Annotated[float, typer.Option(help="Seconds a run may take to end after a kill.")] = 120,
) -> None:
    """Kill, resume, compare."""
    testbed, out = testbed.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record, run, alone = out / "kills.jsonl", out / "killed", out / "alone"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for number in range(len(done), kills):
        kind = list(VICTIMS)[number % len(VICTIMS)]
        entry = kill_once(testbed, run, steps, kind, random.Random(f"{seed}/{number}"), grace)
        if not entry:
            raise typer.BadParameter(f"the run ended after {len(done)} kills (see {run}.out): give it more --steps.")
        done.append(entry)
        with record.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        console.print(f"[{number + 1}/{kills}]", entry, markup=False)
    for folder in (run, alone):
        if last_step(folder) < steps and start(testbed, folder, steps).wait():
            raise typer.BadParameter(f"{folder} did not run to its end: see {folder}.out.")
    table = Table("killed", "after, s", "at step", "checkpoint", "run ended after, s", "processes left")
    for e in done:
        ended = "hung" if e["ended"] is None else str(e["ended"])
        table.add_row(e["killed"], str(e["seconds"]), str(e["step"]), str(e["checkpoint"]), ended, str(e["left"]))
    console.print(table)
    again = list(repeated(run))
    largest = max((abs(one - other) for _, one, other in again), default=0.0)
    console.print(
        f"{len(again)} steps were taken again from their checkpoint; largest difference of {REPEATED}: {largest:.1e}"
    )
    for name, folder in (("killed", run), ("left alone", alone)):
        rewards = [value for _, value in run_log.series(folder / "metrics.jsonl", "on_policy/reward")]
        console.print(f"mean on-policy reward of the run {name}: {sum(rewards) / len(rewards):.3f}")
    if missing := missing_metrics(run, steps):
        console.print(f"no metrics of {missing}: where a checkpoint is, a kill came between it and its line")
    found = list(differences(run, alone, steps, [entry["checkpoint"] for entry in done]))
    for line in found or ["no difference: same rows and prefixes in every step, no line lost or doubled"]:
        console.print(line, markup=False)
    raise typer.Exit(bool(found))


if __name__ == "__main__":
    typer.run(main)
