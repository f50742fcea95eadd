"""Grade in bounded time from any thread: what needs algebra runs in processes that are killed at a deadline.

The processes are started as `python -c` rather than by `multiprocessing`, which would import the caller's `__main__`
(verl's, with torch) into each of them, and need the main thread for its bookkeeping.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from verl_prefix.grading import answers, literals

logger = logging.getLogger(__name__)

#: every `Grade.reason` and what it means
REASONS = {
    "correct": "the answer is right",
    "wrong": "the answer is not right",
    "no_answer": "no box and no ####, an empty or unclosed last box, or (think format) nothing of it after </think>",
    "format": "a think format is asked for and the thinking is not closed",
    "unparsable": "the answer is not mathematics, or too long to be compared",
    "truth_unparsable": "the ground truth is empty or not mathematics, and the answer is not the same text",
    "timeout": "the comparison used up its deadline",
    "crash": "the grader process died during the comparison, or could not be started",
}

_START_SECONDS = 120.0
#: a deadline in seconds by the clock, as a multiple of the one in computing time
_PATIENCE = 4
#: tasks in flight per worker in `map`
_WINDOW = 16


@dataclass(frozen=True)
class Grade:
    """score: 1.0 for `correct`, else 0.0. reason: one of `REASONS`."""

    score: float
    reason: str


_GRADES = {reason: Grade(float(reason == "correct"), reason) for reason in REASONS}


def grade_text(response: Any, truth: Any, *, think_format: bool = False) -> Grade | list[literals.Question]:
    """The grade where no algebra is needed, else the comparisons that remain, one per accepted answer."""
    wanted = answers.true_answers(truth)
    if not wanted:
        return _GRADES["truth_unparsable"]
    text = response.decode(errors="replace") if isinstance(response, bytes) else response
    if not isinstance(text, str):
        return _GRADES["no_answer"]
    if think_format:
        text = answers.after_thinking(text)
        if text is None:
            return _GRADES["format"]
    answer = answers.final_answer(text)
    if answer is None:
        return _GRADES["no_answer"]
    open_questions = []
    for accepted in wanted:
        decision = literals.decide(answer, accepted)
        if decision is True:
            return _GRADES["correct"]
        if decision is not False:
            open_questions.append(decision)
    return open_questions or _GRADES["wrong"]


class GraderPool:
    """Processes that grade, each comparison within a deadline.

    Args:
        workers: processes at most; they are started when there is work for them (0.5 s each).
        deadline: seconds of computing for a comparison, from when a worker takes it, and 4 times as many by the
            clock. A worker that exceeds it, or dies, is replaced.

    Methods may be called from any thread and after a fork, and no response and no truth makes them raise. A pool that
    is never closed ends with the interpreter.
    """

    def __init__(self, workers: int = 2, deadline: float = 5.0):
        if workers < 1 or not 0 < deadline < float("inf"):
            raise ValueError(f"workers={workers}, deadline={deadline}: both have to be positive and finite")
        self.workers, self.deadline = workers, deadline
        self._closed = False
        self._reset()
        _open_pools.add(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[tuple[list[literals.Question], Future[Grade]] | None] = queue.SimpleQueue()
        self._lanes: list[_Lane] = []
        self._pending = 0

    def submit(self, response: Any, truth: Any, *, think_format: bool = False) -> Future[Grade]:
        """Grade soon. Raises RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("this GraderPool is closed")
        future: Future[Grade] = Future()
        try:
            found = grade_text(response, truth, think_format=think_format)
        except Exception:
            # a text no rule foresees must not cost a training run a group of rollouts
            logger.warning("grading failed on a response of type %s", type(response).__name__, exc_info=True)
            found = _GRADES["unparsable"]
        if isinstance(found, Grade):
            future.set_result(found)
            return future
        with self._lock:
            if self._closed:
                raise RuntimeError("this GraderPool is closed")
            if len(self._lanes) < min(self.workers, self._pending + 1):
                lane = _Lane(self)
                lane.start()
                self._lanes.append(lane)
            self._pending += 1
            self._tasks.put((found, future))
        return future

    def grade(self, response: Any, truth: Any, *, think_format: bool = False) -> Grade:
        """Grade and wait."""
        return self.submit(response, truth, think_format=think_format).result()

    def map(self, pairs: Iterable[tuple[Any, Any]], *, think_format: bool = False) -> Iterator[Grade]:
        """Grades of (response, truth) pairs in their order. Takes only a bounded number of pairs ahead."""
        pairs = iter(pairs)
        ahead = deque(self.submit(*pair, think_format=think_format) for pair in islice(pairs, _WINDOW * self.workers))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(self.submit(*pair, think_format=think_format) for pair in islice(pairs, 1))

    def close(self) -> None:
        """End the processes at once; tasks still waiting are cancelled. May be called twice."""
        with self._lock:
            if self._closed or self._pid != os.getpid():
                return
            self._closed = True
        _open_pools.discard(self)
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[1].cancel()
        for lane in self._lanes:
            self._tasks.put(None)
            lane.stop()
        for lane in self._lanes:
            lane.join(timeout=5)

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _done(self) -> None:
        with self._lock:
            self._pending -= 1

    def _after_fork(self) -> None:
        """In a forked child: the threads are gone and the processes are the parent's."""
        for lane in self._lanes:
            lane.forget()
        self._reset()


class _Lane(threading.Thread):
    """The thread that feeds one process."""

    def __init__(self, pool: GraderPool):
        super().__init__(name="grader", daemon=True)
        self._pool, self._tasks, self._deadline = pool, pool._tasks, pool.deadline
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def run(self) -> None:
        while (task := self._tasks.get()) is not None:
            questions, future = task
            if future.set_running_or_notify_cancel():
                try:
                    reason = self._reason(questions)
                except Exception:
                    logger.warning("a grader process could not be used", exc_info=True)
                    self._kill()
                    reason = "crash"
                future.set_result(_GRADES[reason])
            self._pool._done()
        self._kill()

    def _reason(self, questions: list[literals.Question]) -> str:
        """The verdict over all accepted answers: one that matches suffices; else the first that could be compared."""
        reasons = []
        allowance = None
        for question in questions:
            process = self._ready_process()
            if process is None:
                return "crash"
            allowance = allowance or _Allowance(process.pid, self._deadline)
            reason = self._compare(process, question, allowance)
            if reason in ("correct", "timeout", "crash"):
                return reason
            reasons.append(reason)
        return min(reasons, key=["wrong", "unparsable", "truth_unparsable"].index)

    def _compare(self, process: subprocess.Popen, question: literals.Question, allowance: _Allowance) -> str:
        try:
            process.stdin.write(json.dumps([question.answer, question.truth]).encode() + b"\n")
        except OSError:
            self._kill()
            return "crash"
        line = _read_line(process, allowance)
        if line in REASONS:
            return line
        self._kill()
        return "timeout" if line is None else "crash"

    def _ready_process(self) -> subprocess.Popen | None:
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._stopped:
            return None
        self._kill()
        path = [str(Path(__file__).resolve().parents[2]), *sys.path]
        start = (
            f"import sys; sys.path[:] = {path!r}\nfrom verl_prefix.grading import worker; worker.main({self._deadline})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if self._stopped:  # by another thread, while this one started the process
            self._process.kill()
        if _read_line(self._process, _Allowance(self._process.pid, _START_SECONDS)) == "ready":
            return self._process
        self._kill()
        if self._stopped:
            return None
        logger.warning(
            "a grader process did not start; is math-verify installed? Try: %s -c 'import math_verify'", sys.executable
        )
        return None

    def stop(self) -> None:
        """From another thread: end the process; this lane's thread then cleans up."""
        self._stopped = True
        process = self._process
        if process is not None:
            process.kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def forget(self) -> None:
        """Drop the parent's process in a forked child, so that its stdin ends with the parent."""
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            process.stdout.close()
            process.returncode = 0  # not ours to wait for


class _Allowance:
    """`seconds` of a process's own computing time, and at most `_PATIENCE` times as many by the clock.

    Graders share their machine with training: by the clock alone, a busy one would turn right answers into timeouts.
    """

    def __init__(self, pid: int, seconds: float):
        self._pid, self._seconds = pid, seconds
        self._begin, self._used = time.monotonic(), _cpu_seconds(pid)

    def left(self) -> float:
        """Seconds to wait before asking again; at most 0 when the allowance is used up."""
        waited = time.monotonic() - self._begin
        used = _cpu_seconds(self._pid)
        # without a reading (no /proc) the clock alone decides
        computed = waited if used is None or self._used is None else used - self._used
        return min(self._seconds - computed, _PATIENCE * self._seconds - waited)


def _cpu_seconds(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read_line(process: subprocess.Popen, allowance: _Allowance) -> str | None:
    """A line of the process's stdout; None when its allowance is used up, "" if it ended."""
    line = b""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        left = allowance.left()
        if left <= 0:
            return None
        if not poll.poll(max(left, 0.01) * 1000):
            continue
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            return ""
        line += chunk
    return line.decode(errors="replace").strip()


_open_pools: set[GraderPool] = set()


def _close_all() -> None:
    for pool in list(_open_pools):
        pool.close()


def _after_fork() -> None:
    for pool in list(_open_pools):
        pool._after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
