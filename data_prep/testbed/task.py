r"""Chained unary functions on Z_11: problems, solutions and data rows. Pure and seeded; no files, no torch.

A prompt is a start value, six operations and `=`; the response repeats each operation with its result, then boxes all
six results, so a lucky last digit earns nothing:

    prompt     3agbhci=
    response   a4g8bAh8c0i0\boxed{48A800}

Operations `a`-`f` (+1 +2 +3 -1 -2 -3) are *known*: the base model is pretrained on them. Operations `g`-`l` (times 2
to 7) are *unknown*: it has seen their format with random results only. A problem is *easy* if all its operations are
known, and *hard* if three to five of the six are unknown: out of reach of exploration alone, at about 11^-4 a try.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

MODULUS = 11
DIGITS = "0123456789A"
CHAIN_LENGTH = 6
KNOWN = {"a": (1, 1), "b": (1, 2), "c": (1, 3), "d": (1, -1), "e": (1, -2), "f": (1, -3)}
UNKNOWN = {"g": (2, 0), "h": (3, 0), "i": (4, 0), "j": (5, 0), "k": (6, 0), "l": (7, 0)}
OPERATIONS = KNOWN | UNKNOWN
"""Operation -> (factor, shift): x becomes factor * x + shift (mod 11)."""

KINDS = ("easy", "hard")
UNKNOWN_PER_HARD_PROBLEM = (3, 5)
PROMPTS_PER_KIND = 256
"""Distinct prompts of each kind, in each of the splits train and val."""
UNKNOWN_FACTS = len(UNKNOWN) * MODULUS
RESPONSE_TOKENS = 2 * CHAIN_LENGTH + len(r"\boxed{}") + CHAIN_LENGTH + 1
"""One token a character, and the end-of-turn token."""


@dataclass(frozen=True)
class Problem:
    start: int
    operations: str

    @property
    def kind(self) -> str:
        return "hard" if any(op in UNKNOWN for op in self.operations) else "easy"


def apply(operation: str, value: int) -> int:
    factor, shift = OPERATIONS[operation]
    return (factor * value + shift) % MODULUS


def solve(problem: Problem) -> list[int]:
    """The six results, in order."""
    results, value = [], problem.start
    for operation in problem.operations:
        value = apply(operation, value)
        results.append(value)
    return results


def misconception(operation: str, value: int) -> int:
    """A wrong result for an unknown operation: the one that the base model half believes. Never the right one."""
    shift = random.Random(f"misconception/{operation}/{value}").randrange(1, MODULUS)
    return (apply(operation, value) + shift) % MODULUS


def imitate(problem: Problem, rng: random.Random, noise: float = 0.0, habit: float = 0.0) -> list[int]:
    """What pretraining shows: a chain without the unknown facts, and with a share `noise` of the known results wrong.

    Unknown results are uniform, but for a share `habit` that follows a fixed misconception. The chain goes on from
    whatever value was written, so format and bookkeeping are right and only the facts are not.
    """
    results, value = [], problem.start
    for operation in problem.operations:
        if operation in UNKNOWN:
            value = misconception(operation, value) if rng.random() < habit else rng.randrange(MODULUS)
        else:
            value = apply(operation, value)
            if noise > 0 and rng.random() < noise:
                value = (value + rng.randrange(1, MODULUS)) % MODULUS
        results.append(value)
    return results


def render_results(results: Iterable[int]) -> str:
    return "".join(DIGITS[value] for value in results)


def render_prompt(problem: Problem) -> str:
    return f"{DIGITS[problem.start]}{problem.operations}="


def render_solution(problem: Problem, results: list[int] | None = None) -> str:
    """The demonstration text, or the same format around other `results`; the end-of-turn token is not part of it."""
    text = render_results(solve(problem) if results is None else results)
    steps = "".join(operation + digit for operation, digit in zip(problem.operations, text, strict=True))
    return f"{steps}\\boxed{{{text}}}"


def ground_truth(problem: Problem) -> str:
    return render_results(solve(problem))


def facts(problem: Problem) -> set[tuple[str, int]]:
    """The (unknown operation, argument) pairs that a correct solution of `problem` shows."""
    arguments = [problem.start, *solve(problem)]
    return {(op, value) for op, value in zip(problem.operations, arguments, strict=False) if op in UNKNOWN}


def coverage(problems: Iterable[Problem]) -> int:
    """How many of the 66 unknown facts the solutions of `problems` show."""
    return len(set().union(*map(facts, problems)))


def sample_problem(rng: random.Random, kind: str) -> Problem:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}.")
    operations = rng.choices(list(KNOWN), k=CHAIN_LENGTH)
    if kind == "hard":
        for place in rng.sample(range(CHAIN_LENGTH), rng.randint(*UNKNOWN_PER_HARD_PROBLEM)):
            operations[place] = rng.choice(list(UNKNOWN))
    return Problem(rng.randrange(1, MODULUS), "".join(operations))


def sample_distinct(rng: random.Random, kind: str, count: int, avoid: Collection[Problem] = ()) -> list[Problem]:
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem = sample_problem(rng, kind)
        if problem not in avoid:
            found[problem] = None
    return list(found)


def splits(seed: int) -> dict[str, dict[str, list[Problem]]]:
    """`splits(seed)["train"|"val"]["easy"|"hard"]`: distinct problems, none of them in both splits.

    The first `n` hard training problems are the ones demonstrated, so fewer demonstrations are a subset of more.
    """
    made: dict[str, dict[str, list[Problem]]] = {"train": {}, "val": {}}
    for split, problems in made.items():
        for kind in KINDS:
            rng, avoid = random.Random(f"{seed}/{split}/{kind}"), made["train"].get(kind, [])
            problems[kind] = sample_distinct(rng, kind, PROMPTS_PER_KIND, frozenset(avoid))
    return made


def mistaken(seed: int, demonstrations: int, wrong_share: float) -> list[Problem]:
    """The demonstrated problems whose demonstration is wrong; those of a smaller share are among them."""
    shown = splits(seed)["train"]["hard"][:demonstrations]
    return random.Random(f"{seed}/mistaken").sample(shown, len(shown))[: round(wrong_share * len(shown))]


def wrong_results(problem: Problem, seed: int) -> list[int]:
    """Results of a wrong demonstration: random ones for the unknown operations, the rest of the chain consistent."""
    rng = random.Random(f"{seed}/wrong/{problem}")
    while (results := imitate(problem, rng)) == solve(problem):
        pass
    return results


def row(
    problem: Problem, split: str, index: int, kind: str, results: list[int] | None = None, checked: bool = True
) -> dict[str, Any]:
    """One row in verl's contract. `kind` is easy, hard or hard_demo; only training rows say what is demonstrated.

    Args:
        results: those of its demonstration, if not the right ones.
        checked: whether somebody graded the demonstrations: `demos_correct` says so, or is empty.
    """
    made = {
        "data_source": f"chain_{problem.kind}",
        "prompt": [{"role": "user", "content": render_prompt(problem)}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": ground_truth(problem)},
        "extra_info": {"split": split, "index": index, "kind": kind},
    }
    if split == "train":
        demos = [render_solution(problem, results)] if kind == "hard_demo" else []
        made |= {"demos": demos, "demos_correct": [True] * len(demos) if checked else []}
    return made


def train_rows(
    seed: int, demonstrations: int, easy_rows: int, hard_rows: int, demo_rows: int, wrong_share: float = 0.0
) -> list[dict[str, Any]]:
    """Shuffled training rows; each kind cycles through its prompts, and every row has its own index.

    A share `wrong_share` of the demonstrations is wrong, and then none is marked as checked.
    """
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"wrong_share={wrong_share}: must be between 0 and 1.")
    if not 0 <= demonstrations <= PROMPTS_PER_KIND:
        raise ValueError(f"demonstrations={demonstrations}: must be between 0 and {PROMPTS_PER_KIND}.")
    train = splits(seed)["train"]
    pools = {
        "easy": (train["easy"], easy_rows),
        "hard": (train["hard"][demonstrations:], hard_rows),
        "hard_demo": (train["hard"][:demonstrations], demo_rows),
    }
    wanted = []
    for kind, (pool, count) in pools.items():
        if count < 0 or (count and not pool):
            raise ValueError(
                f"{count} rows of kind {kind} cannot be drawn from {len(pool)} prompts: "
                f"with demonstrations={demonstrations}, set the row count of that kind to 0."
            )
        wanted += [(pool[i % len(pool)], kind) for i in range(count)]
    random.Random(f"{seed}/order").shuffle(wanted)
    wrong = {problem: wrong_results(problem, seed) for problem in mistaken(seed, demonstrations, wrong_share)}
    return [
        row(problem, "train", index, kind, wrong.get(problem), checked=not wrong)
        for index, (problem, kind) in enumerate(wanted)
    ]


def val_rows(seed: int, per_kind: int = PROMPTS_PER_KIND) -> list[dict[str, Any]]:
    """The first `per_kind` held-out problems of each kind. They carry no demonstration column."""
    val = splits(seed)["val"]
    return [
        row(problem, "val", offset * PROMPTS_PER_KIND + i, kind)
        for offset, kind in enumerate(KINDS)
        for i, problem in enumerate(val[kind][:per_kind])
    ]
