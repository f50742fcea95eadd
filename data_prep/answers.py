r"""Answer cells as the grader is given them: `\boxed{204}`, `work #### 18`, `$\frac12$` and `["12"]` become the answer.

What counts as the answer of a text is the grader's own decision (`verl_prefix.grading.answers`), so that the truth is
taken out of a reference solution by the same rule as the answer out of a response.
"""

from __future__ import annotations

import json

from verl_prefix.grading.answers import final_answer, true_answers

#: the last box of a solution, or what follows its last `####`; None if there is neither, or the last box is not closed
of_solution = final_answer


def normalise(cell: str) -> str | None:
    """An answer cell without box, `####` or dollar signs around it; None if it holds no answer.

    Several accepted answers, a JSON list in a string, stay a JSON list: the grader accepts any of them.
    """
    accepted = [_without_dollars(answer) for answer in true_answers(cell)]
    if len(accepted) > 1:
        return json.dumps(accepted, ensure_ascii=False)
    return accepted[0] if accepted else None


def join(answers: list[str]) -> str | None:
    """Several answers that are wanted together as one, separated by commas; None if there are none."""
    return ", ".join(found for answer in answers if (found := normalise(answer))) or None


def _without_dollars(text: str) -> str:
    for mark in ("$$", "$"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            inner = text[len(mark) : -len(mark)]
            if mark not in inner:
                return inner.strip()
    return text
