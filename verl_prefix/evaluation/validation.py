"""Samples out of verl's validation dump (`trainer.validation_data_dir`), so that both ways share one estimator.

verl writes `STEP.jsonl` with `input`, `output`, `gts`, `score`, what the grader returned (`acc`, ...) and
`uid` = `{prompt's uid}_{session}_{output}` (verl 0.9.1, `_dump_generations`). It has no data set: that comes from the
validation file, matched by rendered prompt and answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_prefix.evaluation.grading import correct
from verl_prefix.evaluation.problems import Problem
from verl_prefix.exceptions import EvaluationError

#: data set of every sample where no validation file is given
ALL = "validation"


def latest(folder: Path, step: int | None = None) -> Path:
    """The dump of `step`, or of the last one.

    Raises:
        EvaluationError: there is none.
    """
    dumps = {int(file.stem): file for file in folder.glob("*.jsonl") if file.stem.isdigit()}
    if not dumps:
        raise EvaluationError(
            f"--validation {folder}: no STEP.jsonl there; verl writes them with trainer.validation_data_dir=DIR."
        )
    if step is not None and step not in dumps:
        raise EvaluationError(f"--step {step}: {folder} has {', '.join(map(str, sorted(dumps)))}.")
    return dumps[max(dumps) if step is None else step]


def read(dump: Path, problems: Sequence[Problem] = (), tokenizer: Any = None) -> list[dict[str, Any]]:
    """One record per sample, like those of `samples.jsonl`.

    Args:
        problems: of the validation files, for the data set of each sample; without them all are one set.

    Raises:
        EvaluationError: a damaged line, one without verl's keys, or a prompt that is not in the files.
    """
    sets = _sets(problems, tokenizer)
    records: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    # as bytes: verl leaves U+2028 and its like unescaped, and str.splitlines() would part a line there
    for number, line in enumerate(dump.read_bytes().splitlines(), 1):
        where = f"{dump}: line {number}"
        try:
            entry = json.loads(line)
            uid, session, output = entry["uid"].rsplit("_", 2)
            key, text = (uid, int(session)), _key(entry["input"], entry["gts"])
            order = int(output)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{where} is not of a verl 0.9.1 dump ({type(error).__name__}: {error}).") from error
        if problems and text not in sets:
            raise EvaluationError(
                f"{where}: its prompt and answer are in none of the files. Give the run's data.val_files and --model; "
                "a prompt cut at data.max_prompt_length is not found."
            )
        data_source, ability = sets.get(text, (ALL, ""))
        record = {"problem": uid, "sample": int(session), "data_source": data_source, "ability": ability}
        if key not in records or records[key][0] < order:  # of several outputs the last one carries the score
            records[key] = order, {**record, "grade": entry, "correct": correct(entry, where)}
    return [record for _, record in records.values()]


def _key(prompt: str, truth: Any) -> str:
    return json.dumps([prompt, truth], default=str)


def _sets(problems: Sequence[Problem], tokenizer: Any) -> dict[str, tuple[str, str]]:
    sets: dict[str, tuple[str, str]] = {}
    for problem in problems:
        # as verl decodes what it dumps
        key = _key(tokenizer.decode(problem.prompt_ids, skip_special_tokens=True), problem.ground_truth)
        of = (problem.data_source, problem.ability)
        if sets.setdefault(key, of) != of:
            raise EvaluationError(
                f"{problem.key}: the same prompt and answer are in {sets[key][0]} too; the dump does not tell which is "
                "which. Drop one from the files."
            )
    return sets
