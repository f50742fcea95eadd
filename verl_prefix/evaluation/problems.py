"""The problems of evaluation files, with the token ids that training's rollouts would start from.

Prompts are rendered here, with the checkpoint's tokenizer and the call that verl's agent loops make, and go to the
server as ids: no second template, no text tokenised again, so a prompt is the one of training. verl cuts the beginning
off prompts of more than `data.max_prompt_length` tokens; here they stay whole.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_prefix.exceptions import EvaluationError

COLUMNS = ("prompt", "data_source", "reward_model")


@dataclass(frozen=True)
class Problem:
    """A row of an evaluation file.

    Attributes:
        key: `FILE:ROW` with the file's name and the row's position from 0.
        ability: column of that name; "" where the file has none.
        prompt_ids: token ids, generation prompt included.
    """

    key: str
    data_source: str
    ability: str
    ground_truth: Any
    extra_info: Mapping[str, Any]
    prompt_ids: list[int]


def read(
    files: Sequence[Path], tokenizer: Any, *, template: Mapping[str, Any] | None = None, limit: int = 0
) -> list[Problem]:
    """The problems of verl-format parquet files, in their order; the first `limit` rows of each (0: all).

    Args:
        template: keywords of `apply_chat_template`, as in verl's `data.apply_chat_template_kwargs`.

    Raises:
        EvaluationError: an unreadable file, a missing column, a row that cannot be rendered or has no answer, or two
            files of one name.
    """
    names = [file.name for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise EvaluationError(f"{', '.join(sorted(twice))}: named twice; results are kept by file name. Rename one.")
    found = []
    for file in files:
        rows = _rows(file)
        if not rows:
            raise EvaluationError(f"{file}: has no rows. Make the file again.")
        found += [_problem(file, number, row, tokenizer, template or {}) for number, row in enumerate(rows)][
            : limit or None
        ]
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        there = pq.read_schema(file).names
        if missing := [name for name in COLUMNS if name not in there]:
            raise EvaluationError(
                f"{file}: has no column {', '.join(missing)}, only {', '.join(there)}. Evaluation files are made by "
                "`verl-prefix data convert`."
            )
        wanted = [name for name in (*COLUMNS, "extra_info", "ability") if name in there]
        return pq.read_table(file, columns=wanted).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"{file}: is not a readable parquet file ({reason}). Make or copy it again.") from error


def _problem(file: Path, number: int, row: dict[str, Any], tokenizer: Any, template: Mapping[str, Any]) -> Problem:
    where = f"{file}: row {number}"
    truth = (row["reward_model"] or {}).get("ground_truth")
    if truth is None:
        raise EvaluationError(f"{where} has no reward_model.ground_truth. Add the answer or drop the row.")
    if not isinstance(row["data_source"], str):
        raise EvaluationError(f"{where}, data_source is {row['data_source']!r}, not a name. Mend the row.")
    try:
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False, **template
        )
    except Exception as error:  # jinja, tokenizers and transformers raise what they like
        raise EvaluationError(
            f"{where}: the chat template cannot render its prompt ({error}). Give --chat-template, or mend the row."
        ) from error
    return Problem(
        key=f"{file.name}:{number}",
        data_source=row["data_source"],
        ability=row.get("ability") or "",
        ground_truth=truth,
        extra_info=row.get("extra_info") or {},
        prompt_ids=list(ids),
    )


def digest(problems: Sequence[Problem]) -> str:
    """Of what decides the samples and their grades: prompts by token id, sets and answers."""
    parts = [[p.key, p.data_source, p.ground_truth, p.prompt_ids] for p in problems]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def samples_of(problems: Sequence[Problem], n: int, per_set: Sequence[str]) -> dict[str, int]:
    """Samples per problem of each data set: `n`, or what `SET=N` of `per_set` says.

    Raises:
        EvaluationError: not of that form, or a data set that the files do not have.
    """
    samples = dict.fromkeys((problem.data_source for problem in problems), n)
    for entry in per_set:
        name, _, number = entry.partition("=")
        if not number.isdigit() or int(number) < 1:
            raise EvaluationError(f"--n-of {entry}: write SET=N with N from 1, e.g. aime24=32.")
        if name not in samples:
            near = ", ".join(difflib.get_close_matches(name, samples)) or ", ".join(sorted(samples))
            raise EvaluationError(f"--n-of {entry}: the files have no data_source {name!r}; did you mean {near}?")
        samples[name] = int(number)
    return samples
