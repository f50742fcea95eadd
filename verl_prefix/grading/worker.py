"""A grader process: one comparison per line on stdin, one verdict per line on stdout. Started by `pool`.

Imports neither torch nor verl. It ends with its stdin, and the kernel ends it if its parent is gone while it hangs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

from verl_prefix.grading import equality

#: address space of a worker; what needs more is a MemoryError inside it
MAX_BYTES = 2 << 30

#: one of each kind, so that lazy imports and first parses are paid before a deadline runs
_WARM_UP = (
    ("\\frac{x+1}{2}", "0.5+x/2"),
    ("x=\\sqrt{2}", "1.41421356"),
    ("2,1", "\\{1,2\\}"),
    ("0<x<1", "(0,1)"),
    ("x\\leq 2", "2\\geq x"),
    ("[1,2]\\cup[3,4]", "(1,2]"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
)


def main(deadline: float) -> None:
    """Serve until stdin ends. `deadline`: seconds the parent grants a comparison."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    # The protocol keeps the original stdout; a stray print of a library must not get into it.
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MAX_BYTES)
    for answer, truth in _WARM_UP:
        _verdict(answer, truth)
    print("ready", file=replies)
    for line in sys.stdin:
        _limit_cpu(deadline)
        answer, truth = json.loads(line)
        print(_verdict(answer, truth), file=replies)


def _verdict(answer: str, truth: str) -> str:
    try:
        return equality.compare(answer, truth)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # math-verify's TimeoutException is none of Exception
        return "unparsable"


def _limit_cpu(deadline: float) -> None:
    """Let the kernel end this process soon after the deadline, even if no parent is left to do it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + deadline) + 2)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
