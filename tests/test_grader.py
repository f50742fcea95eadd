"""The grader's decisions: the table of `grader_cases.py`, its properties, and the reward function as verl loads it."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_prefix.grading import answers
from verl_prefix.grading.literals import decide, literal
from verl_prefix.grading.pool import REASONS, GraderPool
from verl_prefix.reward import compute_score


def _table():
    spec = importlib.util.spec_from_file_location("grader_cases", Path(__file__).with_name("grader_cases.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = _table()
CASES = TABLE.equality_cases()


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, deadline=5.0) as pool:
        yield pool


def test_the_table_is_as_large_as_promised():
    assert len(CASES) >= 150
    assert sum(not right for *_, right in CASES) >= 60
    assert {reason for *_, reason in TABLE.RESPONSES} >= set(REASONS) - {"timeout", "crash"}


@pytest.mark.parametrize(("group", "truth", "answer", "right"), CASES, ids=lambda value: str(value)[:40])
def test_equality(pool, group, truth, answer, right):
    grade = pool.grade(f"We get $\\boxed{{{answer}}}$.", truth)
    assert (grade.reason == "correct") is right, grade
    assert grade.score == float(right)
    assert grade.reason in ("correct", "wrong", "unparsable", "truth_unparsable")


@pytest.mark.parametrize(
    ("response", "truth", "think_format", "reason"),
    [case[1:] for case in TABLE.RESPONSES],
    ids=[case[0] for case in TABLE.RESPONSES],
)
def test_response(pool, response, truth, think_format, reason):
    start = time.perf_counter()
    assert pool.grade(response, truth, think_format=think_format).reason == reason
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}} and \boxed{\text{a}b}", r"\text{a}b"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{a\\}b}", r"a\\"),
        (r"\boxed{", None),
        ("#### 5 ", "5"),
        ("####", None),
        ("### 5", None),
    ],
)
def test_final_answer(text, answer):
    assert answers.final_answer(text) == answer


@pytest.mark.parametrize(
    "char", ["{", "}", "(", "$", ".", " ", "\\", "√(", r"\text{ ", r"\frac{", "1,", "1 ", "^{", "|"]
)
@pytest.mark.parametrize("tail", ["", "x"])
def test_normalising_odd_input_takes_no_time(char, tail):
    text = char * (answers.MAX_ANSWER_CHARS // len(char)) + tail
    start = time.perf_counter()
    decide(text, "5")
    decide("5" + text, "5")
    assert time.perf_counter() - start < 1.0


@given(st.fractions(max_denominator=10**6))
def test_a_number_in_any_notation_keeps_its_value(value):
    top, bottom = value.numerator, value.denominator
    for text in (f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{top}}}{{{bottom}}}"):
        assert decide(text, f"{top}/{bottom}") is True
        assert decide(text, f"{top + 1}/{bottom}") is False
    if bottom == 1:
        assert literal(answers.normalise(f"{top:,}")).value == value
        assert decide(f"{top:,}", str(top)) is True


_PIECES = [*"{}^_$\\1x,( ½", "\\boxed{", "\\frac", "\\text{", "<think>", "</think>", "####", "1" * 20, " or "]
_TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(_PIECES), max_size=30).map("".join))
_THINGS = st.recursive(
    st.one_of(_TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(solution=_THINGS, box=st.booleans(), truth=_THINGS, think_format=st.booleans())
def test_any_input_gets_a_score(solution, box, truth, think_format):
    if box and isinstance(solution, str):
        solution = f"</think>\\boxed{{{solution}}}"
    start = time.perf_counter()
    result = compute_score("unheard of", solution, truth, {"index": 1}, think_format=think_format)
    assert result["score"] in (0.0, 1.0)
    assert all(type(value) is float for value in result.values())
    assert time.perf_counter() - start < 30


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and not set(text) & set("{}\\[]#")))
def test_an_answer_that_repeats_the_truth_is_right_unless_it_is_only_layout(truth):
    if answers.normalise(truth):
        assert compute_score("", f"\\boxed{{{truth}}}", truth)["score"] == 1.0


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "truth",
    [
        Unprintable(),
        [Unprintable()],
        {"a": 1},
        10**5000,
        math.nan,
        "[" * 100_000,
        "\ud800",
        np.array(["5"], object),
        np.int64(5),
    ],
    ids=lambda truth: type(truth).__name__,
)
def test_odd_truths(truth):
    right = isinstance(truth, np.ndarray | np.integer)
    assert compute_score("x", r"\boxed{5}", truth)["score"] == float(right)


# --- the reward function ---


def test_scores_and_metrics():
    right = compute_score("x", r"\boxed{\frac12}", "0.5", correct=1.0, wrong=-1.0)
    assert right == {"score": 1.0, "acc": 1.0} | dict.fromkeys(right.keys() - {"score", "acc"}, 0.0)
    wrong = compute_score("x", r"\boxed{3}", "0.5", correct=1.0, wrong=-1.0)
    assert wrong == {**right, "score": -1.0, "acc": 0.0}
    assert compute_score("x", "3", "0.5")["grader_no_answer"] == 1.0
    assert compute_score("x", "\\boxed{3}", "0.5", think_format=True)["grader_no_answer"] == 1.0
    assert compute_score("x", "\\boxed{3}", "")["grader_unparsable"] == 1.0


def test_metric_names_hold_no_word_that_verl_aggregates_by():
    names = compute_score("x", "", "").keys()
    assert not [name for name in names for word in ("max", "min", "sum", "total", "mean") if word in name]


def test_wrong_options_do_not_raise():
    assert compute_score("x", r"\boxed{5}", "5", workers=0)["grader_crash"] == 1.0


@pytest.mark.parametrize("form", ["pkg://verl_prefix.reward", "pkg://verl_prefix/reward", "file"])
def test_verl_loads_it(form, root):
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    path = str(root / "verl_prefix/reward.py") if form == "file" else form
    function = {"path": path, "name": "compute_score", "reward_kwargs": {"think_format": True, "wrong": -1.0}}
    score = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": function}}))
    # as verl's reward managers call it: by keyword, in a thread of an executor, with keywords of their own
    with ThreadPoolExecutor(1) as executor:
        for solution, expected in ((r"</think>\boxed{x=5}", 1.0), (r"\boxed{x=5}", -1.0)):
            call = executor.submit(
                score,
                data_source="math-ai/aime25",
                solution_str=solution,
                ground_truth="5",
                extra_info={"num_turns": 2},
                reward_router_address=None,
            )
            assert call.result(timeout=60)["score"] == expected


def test_it_imports_no_engine():
    code = (
        "import sys, verl_prefix.reward; verl_prefix.reward.compute_score('', r'\\boxed{x+1}', '1+x');"
        "assert not {'torch', 'verl', 'vllm', 'ray', 'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
