"""Kill a CPU run again and again, start it with the same command, and compare it with one that was left alone.

    python benchmarks/kill_and_resume.py --testbed runs/quickstart/testbed_seed0 --out runs/kills

The process to be killed (SIGKILL) takes turns: driver, task runner, training worker, rollout server, vLLM's engine,
agent loop, Ray's head. The moment is random: some seconds into the start (one in three), or some steps after the run
has gone on. A run that does not end by itself within --grace seconds counts as hung; all of it is then stopped, as a
user would do.

At the end: one line per kill, and what differs from the run that was left alone: rows, prefixes, lines of the rollout
log, steps of the metrics. Whether each start went on right after the last checkpoint; whether it did so with the
checkpoint's weights: the entropy of the prefix tokens at a step that two starts have taken depends on weights and
prefixes alone; and whether the optimizer has counted every step. Exit code 1 if anything differs. All processes of a
killed run are stopped before it is started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
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
#: seconds in which a start has to come to the moment at which it is to be killed
START_LIMIT = 400
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
        children = defaultdict(list)
        for process in psutil.process_iter(["ppid", "create_time"]):
            children[process.info["ppid"]].append(process)
        parents = [process.pid for process in [self._root, *self._seen.values()] if _alive(process)]
        while parents:
            new = [
                child
                for child in children.pop(parents.pop(), ())
                if (child.pid, child.info["create_time"]) not in self._seen
            ]
            self._seen |= {(child.pid, child.info["create_time"]): child for child in new}
            parents += [child.pid for child in new]
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


def steps_of(run: Path, segment: int) -> list[int]:
    """Steps that a start has logged, by the number of its segment; [] before it has got as far as its loop."""
    return [step for entries in list(run_log.segments(run / "metrics.jsonl"))[segment:] for step, _ in entries]


def checkpoint(run: Path) -> int:
    noted = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    text = noted.read_text() if noted.exists() else ""
    return int(text) if text else 0


def segments(run: Path) -> int:
    """How often the run has been resumed and has got as far as its loop."""
    return len(list(run_log.segments(run / "metrics.jsonl"))) - 1


def next_segment(run: Path) -> int:
    """The number that the segment of the next start will have."""
    metrics = run / "metrics.jsonl"
    return segments(run) + bool(metrics.exists() and metrics.stat().st_size)


def optimizer_steps(run: Path) -> set[int]:
    """How many steps the optimizer of the last checkpoint has counted, over its parameters."""
    file = run / "checkpoints" / f"global_step_{checkpoint(run)}" / "actor" / "optim_world_size_1_rank_0.pt"
    state = torch.load(file, weights_only=False)["state"]  # this run's own
    return {int(entry["step"]) for entry in state.values()}


def run_until(testbed: Path, run: Path, steps: int, step: int) -> int:
    """Start the run, stop it once `step` is done; the first step that it has taken."""
    segment = next_segment(run)
    process = start(testbed, run, steps)
    processes = Processes(process.pid)
    while max(steps_of(run, segment), default=0) < step:
        processes.look()
        if process.poll() is not None:
            processes.stop()
            raise typer.BadParameter(f"{run} ended before step {step}: see {run}.out.")
        time.sleep(1)
    process.kill()
    process.wait()
    processes.stop()
    return min(steps_of(run, segment))


def kill_once(testbed: Path, run: Path, steps: int, kind: str, rng: random.Random, grace: float) -> dict[str, Any]:
    """Start the run, kill one process of it, wait for its end."""
    began, saved, segment = time.monotonic(), checkpoint(run), next_segment(run)
    process = start(testbed, run, steps)
    processes = Processes(process.pid)
    early = rng.random() < 1 / 3
    after = rng.uniform(0, 60) if early else rng.uniform(0, 3)
    wanted = saved + rng.randint(1, 2 * SAVE_EVERY)
    ready = None
    while True:
        processes.look()
        ended, late = process.poll() is not None, time.monotonic() - began > START_LIMIT
        if ended or late:
            processes.stop()
            how = f"had no {kind} to kill after {START_LIMIT} s" if late else "ended before it was killed"
            raise typer.BadParameter(f"{run} {how}: see {run}.out; if it was done, give it more --steps.")
        if ready is None and (early or max(steps_of(run, segment), default=0) >= wanted):
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
    return {
        "killed": kind,
        "seconds": round(killed - began, 1),
        "from": saved,  # the checkpoint that it was started from
        "first": min(steps_of(run, segment), default=None),
        "step": at,
        "checkpoint": checkpoint(run),
        "ended": ended,
        "left": left,
    }


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
        if _drawn(lines) != _drawn(other.get(step, [])):
            yield f"step {step}: other rows or prefixes"
    if spare := set(mine) - set(range(1, steps + 3)):  # the last one, and what the run was at work on
        yield f"rollouts of steps {sorted(spare)}"
    if missing := set(missing_metrics(run, steps)) - set(resumed):
        yield f"no metrics of steps {sorted(missing)}"
    for step, before, again in repeated(run):
        if abs(before - again) > TOLERANCE:
            yield f"step {step}: prefix entropy {before:.6f} before the kill, {again:.6f} after it"


def wrong_starts(done: list[dict[str, Any]]) -> list[str]:
    """Starts that did not go on with the step after their checkpoint; None: killed before the first step."""
    wrong = (entry for entry in done if entry["first"] not in (None, entry["from"] + 1))
    return [f"started from checkpoint {entry['from']}, went on with step {entry['first']}" for entry in wrong]


def _write(record: Path, done: list[dict[str, Any]]) -> None:
    record.write_text("".join(json.dumps(entry) + "\n" for entry in done))


def main(
    testbed: Annotated[Path, typer.Option(help="Made by `python -m data_prep.testbed`.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder to write to; a second call goes on with it.")],
    kills: Annotated[int, typer.Option(min=1)] = 21,
    steps: Annotated[int, typer.Option(help="Of the run; enough that it is not over before the last kill.")] = 300,
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
        done.append(entry)
        _write(record, done)
        console.print(f"[{number + 1}/{kills}]", entry, markup=False)
    if done[-1]["killed"]:  # one last start, that is stopped by this script
        saved = checkpoint(run)
        first = run_until(testbed, run, steps, last_step(run) + 2 * SAVE_EVERY)
        done.append({"killed": None, "from": saved, "first": first})
        _write(record, done)
    compared = last_step(run) - 1
    if last_step(alone) <= compared:
        shutil.rmtree(alone, ignore_errors=True)  # one that is resumed is not left alone
        run_until(testbed, alone, steps, compared + 1)
    table = Table("killed", "after, s", "first step", "at step", "checkpoint", "run ended after, s", "processes left")
    for e in (entry for entry in done if entry["killed"]):
        ended = "hung" if e["ended"] is None else str(e["ended"])
        table.add_row(
            *(str(e[key]) for key in ("killed", "seconds", "first", "step", "checkpoint")), ended, str(e["left"])
        )
    console.print(table)
    counted = optimizer_steps(run)
    console.print(f"the optimizer of checkpoint {checkpoint(run)} has counted {counted} steps")
    again = list(repeated(run))
    largest = max((abs(one - other) for _, one, other in again), default=0.0)
    console.print(
        f"{len(again)} steps were taken again from their checkpoint; largest difference of {REPEATED}: {largest:.1e}"
    )
    for name, folder in (("killed", run), ("left alone", alone)):
        rewards = [value for _, value in run_log.series(folder / "metrics.jsonl", "on_policy/reward")]
        console.print(f"mean on-policy reward of the run {name}: {sum(rewards) / len(rewards):.3f}")
    if missing := missing_metrics(run, compared):
        console.print(f"no metrics of {missing}: where a checkpoint is, a kill came between it and its line")
    found = list(differences(run, alone, compared, [entry["from"] for entry in done]))
    found += wrong_starts(done)
    if counted != {checkpoint(run)}:
        found.append("the optimizer has not counted every step")
    if not again:
        found.append("no step was taken again: nothing says that weights were restored")
    same = f"no difference in {compared} steps: same rows and prefixes in each, no line lost or doubled"
    for line in found or [same]:
        console.print(line, markup=False)
    raise typer.Exit(bool(found))


if __name__ == "__main__":
    typer.run(main)
