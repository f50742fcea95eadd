"""The rows of the files that `verl-prefix data` writes: one pydantic model and one Arrow schema for every source.

Training files: verl's columns, the reference solution, and the demonstrations. Evaluation files: verl's columns alone,
so that no validation rollout can start from a demonstration. The schemas are fixed, so that any training files
concatenate, and any evaluation files.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from data_prep.errors import DataError


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Message(_Strict):
    role: str
    content: str


class RewardModel(_Strict):
    """What the grader compares with."""

    ground_truth: str = Field(min_length=1)
    style: str


class ExtraInfo(_Strict):
    """Where the row comes from.

    Attributes:
        index: unique number of the row, in other files too (`first_index`).
        split: `train` or `test`.
        row: 0-based row in the source.
        question: the question without instruction, options or system prompt; decontamination compares it.
    """

    index: int
    split: str
    row: int
    question: str


class EvaluationRow(_Strict):
    data_source: str
    prompt: list[Message] = Field(min_length=1)
    ability: str
    reward_model: RewardModel
    extra_info: ExtraInfo


class TrainingRow(EvaluationRow):
    """A row to train on.

    Attributes:
        solution: the source's reference solution where it has one beside the demonstrations, else "".
        demos: demonstrations, possibly none.
        demos_correct: whether each is right; empty where nobody has looked.
        demos_tokens: tokens of each, EOS not counted; empty without a tokenizer.
        demos_steps: for each, the end of each of its steps in characters; empty lists without steps.
    """

    solution: str
    demos: list[str]
    demos_correct: list[bool]
    demos_tokens: list[int]
    demos_steps: list[list[int]]

    @model_validator(mode="after")
    def _aligned(self) -> TrainingRow:
        count = len(self.demos)
        if len(self.demos_steps) != count or any(
            len(column) not in (0, count) for column in (self.demos_correct, self.demos_tokens)
        ):
            raise ValueError("demos_correct, demos_tokens and demos_steps are not aligned with demos")
        return self


@cache
def _adapter(evaluation: bool) -> TypeAdapter:
    return TypeAdapter(list[EvaluationRow] if evaluation else list[TrainingRow])


def check(rows: list[dict[str, Any]], places: list[tuple[str, int]], *, evaluation: bool) -> None:
    """Check rows against the model. `places` holds file and row of each, for the message.

    Raises:
        DataError: the first cell that does not fit.
    """
    try:
        _adapter(evaluation).validate_python(rows)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        file, row = places[first["loc"][0]]
        column = ".".join(map(str, first["loc"][1:])) or "demos"
        raise DataError(file, first["msg"], "Mend the cell, or drop such rows with --skip-bad.", row, column) from None


@cache
def features(*, evaluation: bool) -> Any:
    """`datasets.Features` of a file; `.arrow_schema` is what its parquet is written with."""
    from datasets import Features, List, Value

    text, number, messages = (
        Value("string"),
        Value("int64"),
        List({"role": Value("string"), "content": Value("string")}),
    )
    columns = {
        "data_source": text,
        "prompt": messages,
        "ability": text,
        "reward_model": {"ground_truth": text, "style": text},
        "extra_info": {"index": number, "split": text, "row": number, "question": text},
    }
    if not evaluation:
        columns |= {
            "solution": text,
            "demos": List(text),
            "demos_correct": List(Value("bool")),
            "demos_tokens": List(number),
            "demos_steps": List(List(number)),
        }
    return Features(columns)


def first_index(name: str, question: str) -> int:
    """`extra_info.index` of row 0 of a file, from its source and first question: rows of different files draw
    independently, also where two files of one format, or two shards, were converted one by one.

    A number of the file times 10^9, so that the last nine digits count the rows; below 2^53, which JSON readers keep.
    """
    import zlib

    return zlib.crc32(f"{name}\n{question}".encode()) % 10**6 * 10**9
