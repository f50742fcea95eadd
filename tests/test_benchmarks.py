"""The benchmarks whose result is a promise, at a small size."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_agent_loop_gives_twice_the_rollouts_of_verls_own():
    """CPU time, so that a busy machine does not matter; measured about 10 times at these sizes."""
    bench = load("bench_agent_loop")
    for store in (False, True):
        theirs, ours = bench.measure(prompts=4, n=8, length=256, repeats=2, store=store)
        assert ours > 2 * theirs


def test_the_gpu_check_holds_at_a_small_size_on_the_cpu():
    gpu_check = load("gpu_check")
    results = gpu_check.check(16, 64, 512, 128, torch.device("cpu"), repeats=1)
    errors = {result.what: result.error for result in results if result.error is not None}
    assert len(errors) == 14
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    ("mistake", "noticed"),
    [
        ("clip", ["estimator, entropy clip", "entropy clip alone"]),
        ("loss", ["token loss, float32", "token loss, bfloat16", "  loss, float32", "  loss, bfloat16"]),
        ("log_prob", ["  log p, float32", "  gradient of the logits, bfloat16"]),
    ],
)
def test_the_gpu_check_notices_a_mistake(mistake, noticed, monkeypatch):
    gpu_check = load("gpu_check")
    if mistake == "clip":
        right = gpu_check.advantage.entropy_clip_mask
        wrong = lambda entropy, mask, config, **more: right(  # noqa: E731
            entropy, mask, dataclasses.replace(config, keep="bottom"), **more
        )
        monkeypatch.setattr(gpu_check.advantage, "entropy_clip_mask", wrong)
        monkeypatch.setattr(gpu_check.credit, "entropy_clip_mask", wrong)
    elif mistake == "loss":
        right = gpu_check.token_policy_loss
        monkeypatch.setattr(
            gpu_check, "token_policy_loss", lambda *args, **more: right(*args, **{**more, "clip_high": 0.2})
        )
    else:
        right = gpu_check.log_prob_and_entropy
        monkeypatch.setattr(gpu_check, "log_prob_and_entropy", lambda logits, word: right(logits * 1.01, word))
    results = gpu_check.check(16, 64, 512, 128, torch.device("cpu"), repeats=1)
    off = [result.what for result in results if result.error is not None and result.error > 1]
    assert set(noticed) <= set(off)


def test_the_gpu_check_needs_neither_verl_nor_an_engine():
    """A machine with a GPU and torch is enough; only these packages of the environment are let in."""
    code = """
import sys
import time
refused = ("verl", "vllm", "ray", "hydra", "transformers", "tensordict", "datasets", "scipy", "typer", "rich", "wrapt")
class Refuse:
    def find_spec(self, name, *args):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["gpu_check", "--cpu", "--rows", "8", "--tokens", "32", "--words", "64", "--chunk", "64", "--repeats", "1"]
import runpy
runpy.run_path("benchmarks/gpu_check.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "logits to loss and back, bfloat16" in done.stdout


@pytest.mark.parametrize("preset", ["prefix_rft", "hpt"])
def test_the_bytes_of_a_step_grow_no_faster_than_its_tokens(preset):
    """Bytes are counted, not timed; workers change nothing that the driver moves."""
    bench = load("bench_scale")
    base = bench.Size(prompts=8, rollouts=8, tokens=512, workers=2)
    factors = [1, 2, 4]

    def moved(size) -> int:
        cost = bench.measure(size, preset)[bench.PLUGIN]
        return cost.got + cost.put

    at_base = moved(base)
    assert at_base > 0
    for axis in ("prompts", "rollouts", "tokens"):
        sizes = [base.times(axis, factor) for factor in factors]
        slope = bench.growth(factors, [at_base, *map(moved, sizes[1:])])
        assert 0.7 < slope < 1.05, (axis, slope)
    assert moved(base.times("workers", 4)) == pytest.approx(at_base, rel=0.02)


# --- kill_and_resume


def test_what_a_killed_run_started_is_found_and_stopped():
    kills = load("kill_and_resume")
    root = subprocess.Popen(["bash", "-c", "bash -c 'sleep 321 & sleep 322'; true"])
    processes = kills.Processes(root.pid)
    begin = time.monotonic()
    while len(processes.look()) < 3 and time.monotonic() - begin < 20:
        time.sleep(0.05)
    assert sorted(p.cmdline()[-1] for p in processes.look() if p.name() == "sleep") == ["321", "322"]
    root.kill()  # its children go on without a parent
    root.wait()
    assert len(processes.look()) == 3
    processes.stop()
    assert processes.look() == []


def test_a_process_may_end_between_two_looks_at_it():
    kills = load("kill_and_resume")

    class Ending:
        def is_running(self):
            return True

        def status(self):
            raise kills.psutil.NoSuchProcess(17)

    processes = kills.Processes(os.getpid())
    processes._root = processes._seen[17, 0.0] = Ending()
    assert processes.look() == []


def test_a_lost_a_doubled_and_a_changed_rollout_are_noticed(tmp_path):
    kills = load("kill_and_resume")
    rows = [
        {"uid": f"u{i}", "row_index": i, "session": 0, "demo_index": 0, "prefix_len": 3, "prefix_ids": [1, 2, 3]}
        for i in range(kills.PROMPTS * kills.ROLLOUTS)
    ]

    def write(name, *, rows=rows, logged=(1, 2)):
        (tmp_path / name / "rollouts").mkdir(parents=True)
        for step in (1, 2):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name / "rollouts" / f"{step}.jsonl").write_text(lines)
        metrics = [{"step": step, "data": {"actor/grad_norm": 1.0, kills.REPEATED: 0.5}} for step in logged]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
        return tmp_path / name

    alone = write("alone")
    assert list(kills.differences(write("same"), alone, 2)) == []
    assert list(kills.differences(write("lost", rows=rows[1:]), alone, 2))
    assert list(kills.differences(write("doubled", rows=[*rows[1:], rows[1]]), alone, 2))
    assert list(kills.differences(write("other", rows=[{**rows[0], "prefix_len": 2}, *rows[1:]]), alone, 2))
    assert list(kills.differences(write("gap", logged=(1,)), alone, 2))
    torn = write("torn")
    (torn / "rollouts/2.jsonl").write_bytes((torn / "rollouts/2.jsonl").read_bytes()[:-9])
    assert "step 2: 32 lines in the rollout log, 31 rollouts" in list(kills.differences(torn, alone, 2))


def test_a_resumed_run_without_its_checkpoints_weights_is_noticed(tmp_path):
    kills = load("kill_and_resume")

    def write(name, *segments):
        (tmp_path / name / "rollouts").mkdir(parents=True)
        for number, entries in enumerate(segments, 1):
            lines = [{"step": s, "data": {"actor/grad_norm": 1.0, kills.REPEATED: v}} for s, v in entries]
            file = f"metrics.part{number}.jsonl" if number < len(segments) else "metrics.jsonl"
            (tmp_path / name / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    first = [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)]
    good = write("good", first, [], [(3, 0.7), (4, 0.61)], [(5, 0.5)])
    assert list(kills.repeated(good)) == [(3, 0.7, 0.7)]
    assert kills.segments(good) == 3
    lost = write("lost", first, [(3, 0.9)])
    found = [line for line in kills.differences(lost, lost, 0) if "prefix entropy" in line]
    assert found == ["step 3: prefix entropy 0.700000 before the kill, 0.900000 after it"]


def test_a_start_that_does_not_go_on_after_its_checkpoint_is_noticed(tmp_path):
    kills = load("kill_and_resume")
    early, right, wrong = ({"from": 4, "first": first} for first in (None, 5, 1))
    assert kills.wrong_starts([early, right]) == []
    assert kills.wrong_starts([right, wrong]) == ["started from checkpoint 4, went on with step 1"]

    assert kills.next_segment(tmp_path) == 0  # no run yet
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "data": {}}) + "\n")
    assert kills.next_segment(tmp_path) == 1
    assert kills.segments(tmp_path) == 0

    saved = tmp_path / "checkpoints" / "global_step_4" / "actor"
    saved.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    state = {name: {"step": torch.tensor(float(step))} for name, step in (("a", 4), ("b", 2))}
    torch.save({"state": state}, saved / "optim_world_size_1_rank_0.pt")
    assert kills.optimizer_steps(tmp_path) == {4, 2}


# --- long_run


def test_growth_is_that_of_the_windows_after_warm_up_and_at_the_end():
    bench = load("long_run")
    samples = [
        {"step": step, "memory": {"driver": 500.0 + min(step, 100) + (step > 900) * 7}} for step in range(0, 1001, 5)
    ]
    samples[30]["memory"]["driver"] = 9000.0  # one sample is not growth
    samples[40]["memory"] = {}  # a process may be missing for a moment
    assert bench.growth(samples, "driver", 100) == (600.0, 607.0)


def test_memory_is_added_up_by_kind_of_process():
    bench = load("long_run")
    code = "import time; held = bytearray(50 * 2**20); print(flush=True); time.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", f"{code}  # ray::WorkerDict"], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        processes = type("Fake", (), {"look": lambda self: [bench.psutil.Process(child.pid)]})()
        found = bench.memory(processes)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert set(found) == {"training worker"}
    assert 50 < found["training worker"] < 100
