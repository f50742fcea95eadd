"""The pool of grader processes: deadlines, replaced workers, threads, forks, and a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from verl_prefix.grading import pool as pool_module
from verl_prefix.grading.pool import REASONS, GraderPool

#: (answer, truth) that math-verify itself would compute on for minutes
HANGS = [("x=9^{99999999}", "x=1"), ("x=100000000!", "x=1"), ("x=(x+1)^{20000}", "x=(x+2)^{20000}")]
#: from data.md: some of them are decided before they hang; all of them end in time
HEAVY = [
    ("9^{99999999}", "5"),
    ("100000000!", "5"),
    ("(x+1)^{20000}", "x+1"),
    ("9^{9^{9^{9}}}", "2"),
    ("5", "9^{99999999}"),
]
#: need algebra, and are right
EASY = [("x^2+2x+1", "(x+1)^2"), ("2,1", "1,2"), ("\\sqrt{8}", "2\\sqrt2"), ("x=5", "5")]
DEADLINE = 1.0
#: what a busy machine may add to a deadline
SLACK = 15.0


def box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, deadline=DEADLINE) as pool:
        assert pool.grade(box("x+1"), "1+x").score == 1.0
        yield pool


def pids(pool: GraderPool) -> list[int]:
    return [lane._process.pid for lane in pool._lanes if lane._process is not None]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("answer", "truth"), HANGS + HEAVY, ids=lambda text: text)
def test_heavy_inputs_end_in_time(pool, answer, truth):
    start = time.monotonic()
    grade = pool.grade(box(answer), truth)
    assert grade.score == 0.0
    assert grade.reason in ("wrong", "timeout", "unparsable", "truth_unparsable")
    assert time.monotonic() - start < 4 * DEADLINE + SLACK


def test_a_hung_worker_is_killed_and_replaced():
    with GraderPool(workers=1, deadline=DEADLINE) as pool:
        assert pool.grade(box("1+x"), "x+1").reason == "correct"
        (hung,) = pids(pool)
        start = time.monotonic()
        waiting = pool.submit(box(HANGS[0][0]), HANGS[0][1])
        behind = pool.submit(box("1+x"), "x+1")
        assert waiting.result(timeout=60).reason == "timeout"
        assert time.monotonic() - start >= DEADLINE * 0.95
        assert behind.result(timeout=60).reason == "correct"
        assert not alive(hung)
        assert pids(pool) != [hung]


@pytest.mark.parametrize("when", ["busy", "idle"])
def test_a_dead_worker_is_replaced(when):
    with GraderPool(workers=1, deadline=60.0) as pool:
        pool.grade(box("1+x"), "x+1")
        (pid,) = pids(pool)
        if when == "busy":
            future = pool.submit(box(HANGS[0][0]), HANGS[0][1])
            assert until(future.running)
            time.sleep(0.3)
            os.kill(pid, signal.SIGSEGV)
            assert future.result(timeout=60).reason == "crash"
        else:
            os.kill(pid, signal.SIGKILL)
            assert until(lambda: not alive(pid))
        assert pool.grade(box("1+x"), "x+1").reason == "correct"


def test_a_worker_that_cannot_start_costs_the_grade_and_no_time(monkeypatch):
    said = []
    monkeypatch.setattr(pool_module.logger, "warning", lambda message, *args, **_: said.append(message % args))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GraderPool(workers=1, deadline=60.0) as pool:
        assert pool.grade(box("1+x"), "x+1").reason == "crash"
        assert pool.grade(box("5"), "5").reason == "correct"
    assert any("math_verify" in message for message in said)


def test_forty_callers_with_five_per_cent_hanging_lose_nothing(pool):
    tasks = [(*EASY[i % len(EASY)], "correct") for i in range(120)]
    for place in range(7, 120, 20):
        tasks[place] = (*HANGS[0], "timeout")
    started = time.monotonic()
    with ThreadPoolExecutor(40) as callers:
        grades = list(callers.map(lambda task: pool.grade(box(task[0]), task[1]), tasks))
    seconds = time.monotonic() - started
    assert [grade.reason for grade in grades] == [reason for *_, reason in tasks]
    # six hangs on two workers, and a restart after each
    assert seconds < 6 / 2 * (4 * DEADLINE + 4) + SLACK

    # recovered: the same work without hangs needs no deadline and no restart
    before = pids(pool)
    started = time.monotonic()
    assert {pool.grade(box(answer), truth).reason for answer, truth in EASY * 5} == {"correct"}
    assert time.monotonic() - started < SLACK
    assert len(pids(pool)) == 2
    assert set(before) <= set(pids(pool))


def test_workers_are_started_when_needed_and_no_more_than_asked_for():
    with GraderPool(workers=2, deadline=DEADLINE) as pool:
        assert pool.grade(box("204"), "204").score == 1.0
        assert pids(pool) == []
        futures = [pool.submit(box("1+x"), "x+1") for _ in range(30)]
        assert {future.result(timeout=60).reason for future in futures} == {"correct"}
        assert len(pids(pool)) == 2


def test_map_keeps_the_order_and_reads_ahead_a_bounded_number(pool):
    taken = 0

    def pairs():
        nonlocal taken
        for number in range(2000):
            taken += 1
            yield (
                box("1+x") if number % 100 == 50 else box(str(number)),
                "x+1" if number % 100 == 50 else str(number & ~1),
            )

    grades = pool.map(pairs())
    first = next(grades)
    assert first.reason == "correct"
    assert taken < 100
    reasons = ["correct", *(grade.reason for grade in grades)]
    assert taken == len(reasons) == 2000
    assert reasons == ["correct" if number % 100 == 50 or number % 2 == 0 else "wrong" for number in range(2000)]


def test_it_works_from_other_threads_of_a_process_whose_main_thread_is_busy(pool):
    found = []
    thread = threading.Thread(target=lambda: found.append(pool.grade(box("1+x"), "x+1").reason))
    thread.start()
    thread.join(60)
    assert found == ["correct"]


def test_closing_ends_the_processes_and_cancels_what_waits():
    pool = GraderPool(workers=1, deadline=60.0)
    pool.grade(box("1+x"), "x+1")
    (pid,) = pids(pool)
    busy = pool.submit(box(HANGS[0][0]), HANGS[0][1])
    waiting = pool.submit(box("1+x"), "x+1")
    assert until(busy.running)
    pool.close()
    pool.close()
    assert busy.result(timeout=10).reason == "crash"
    with pytest.raises(CancelledError):
        waiting.result(timeout=10)
    assert not alive(pid)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("", "")


@pytest.mark.parametrize("arguments", [(0, 1.0), (1, 0.0), (1, float("inf")), (1, float("nan"))])
def test_a_pool_without_workers_or_time_is_refused(arguments):
    with pytest.raises(ValueError, match="positive"):
        GraderPool(*arguments)


def test_a_forked_child_gets_workers_of_its_own(pool):
    pool.grade(box("1+x"), "x+1")
    mine = pids(pool)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        reason = b"nothing"
        try:
            reason = pool.grade(box("1+x"), "x+1").reason.encode()
            reason = reason if not set(pids(pool)) & set(mine) else b"shared"
            pool.close()
        finally:
            os.write(write, reason)
            os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"correct"
    os.waitpid(child, 0)
    assert pool.grade(box("1+x"), "x+1").reason == "correct"
    assert pids(pool) == mine


_SCRIPT = """
import os, sys, threading, time
from verl_prefix.grading.pool import GraderPool
from verl_prefix.reward import compute_score, _pools
assert compute_score("", r"\\boxed{1+x}", "x+1", workers=1)["score"] == 1.0
pool = GraderPool(1, {deadline})  # never closed
assert pool.grade(r"\\boxed{1+x}", "x+1").score == 1.0
pids = [lane._process.pid for p in [pool, *_pools.values()] for lane in p._lanes]
future = pool.submit(r"\\boxed{x=9^{99999999}}", "x=1")
while not future.running():
    time.sleep(0.01)
time.sleep(0.3)
print(*pids, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(3)", 3), ("raise ValueError", 1), ("os.kill(os.getpid(), 9)", -9)],
    ids=["end", "exit", "exception", "killed"],
)
def test_no_process_outlives_its_parent(end, code):
    """Not even one that hangs while the parent is killed: the kernel's CPU limit ends it."""
    script = _SCRIPT.replace("{deadline}", "0.5" if code == -9 else "60.0").replace("{end}", end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert code == 1 or done.stderr == ""
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert until(lambda: not any(map(alive, workers)))


def test_every_reason_is_documented(root):
    text = (root / "docs/grader.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []
