"""What training will do with a data file, before it does: prefixes as they will be drawn, lengths, and what to mend.

Pure functions of the configuration, rows, and a tokenizer: no Ray, no GPU, no verl.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_prefix import training_data
from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import UNUSABLE, DemonstrationTokenizer, as_list
from verl_prefix.exceptions import PrefixConfigError
from verl_prefix.preview_rows import Row, spread
from verl_prefix.sampling import PrefixDraw, cut_prefix, keeps_demonstrations

#: rows named in a warning
_NAMED = 5

#: (row, demonstration) -> score; what it raises counts as a failure of the grader
Grade = Callable[[Row, str], float]


@dataclass(frozen=True)
class PrefixedRollout:
    """One prefixed rollout of a training step, before the policy continues it.

    Attributes:
        demo_ids: token ids of the drawn demonstration.
        prefix_ids: the response's first tokens: the head of `demo_ids`, or all of it and an EOS.
    """

    row: Row
    session: int
    step: int
    draw: PrefixDraw
    demo_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """The names of the rollout log (`trainer.rollout_data_dir`), so that the two can be joined."""
        return {
            "row_index": self.row.index,
            "session": self.session,
            "step": self.step,
            "prefix_len": len(self.prefix_ids),
            "demo_len": self.draw.demo_len,
            "low": self.draw.low,
            "high": self.draw.high,
            "prefix_ids": list(self.prefix_ids),
        }


def prefixed_rollouts(
    config: PrefixConfig, rows: Iterable[Row], steps: Sequence[int], tokenizer: Any, response_length: int
) -> list[PrefixedRollout]:
    """Every prefixed rollout that training would make of `rows`, were they drawn at each of `steps`.

    With `law=adaptive` the interval is that of a row's first visit, [0, 1]: later ones depend on rewards.

    Args:
        steps: verl's global steps, from 1.
        tokenizer: the policy's.
        response_length: `data.max_response_length`, in tokens.
    """
    demonstrations = DemonstrationTokenizer(tokenizer, response_length)
    made = []
    for row in rows:
        for step in steps:
            for session in range(config.sampling.rollouts):
                draw, prefix_ids = cut_prefix(
                    config,
                    demonstrations,
                    row.demonstrations,
                    steps=row.steps,
                    step=step,
                    row_index=row.index,
                    session_id=session,
                )
                if prefix_ids:
                    demo_ids = demonstrations.usable(row.demonstrations)[draw.demo_index]
                    made.append(PrefixedRollout(row, session, step, draw, demo_ids, tuple(prefix_ids)))
    return made


@dataclass
class Look:
    """What an evenly spread sample of a file holds. Lengths are in tokens.

    Attributes:
        total: rows of the file.
        rows: rows of the sample.
        indices: `extra_info.index` -> rows.
        prompt_lens: one per row, chat template included.
        demo_lens: one per demonstration that can be tokenised, without EOS.
        drawable: rows that get a prefix.
        empty: rows without any demonstration.
        plain: rows without a usable demonstration, the empty ones included.
        unusable: reason (a key of `UNUSABLE`) -> demonstrations.
        overlong_prompts: row numbers.
        graded: demonstrations that were graded.
        missed: row numbers of the demonstrations that the grader gives no score above 0.
        truthless: rows with a usable demonstration and without `reward_model.ground_truth`.
        grader_errors: what the grader raised -> how often.
    """

    total: int
    rows: int = 0
    indices: Counter = field(default_factory=Counter)
    prompt_lens: list[int] = field(default_factory=list)
    demo_lens: list[int] = field(default_factory=list)
    drawable: list[Row] = field(default_factory=list)
    empty: int = 0
    plain: int = 0
    unusable: Counter = field(default_factory=Counter)
    overlong_prompts: list[int] = field(default_factory=list)
    graded: int = 0
    missed: list[int] = field(default_factory=list)
    truthless: int = 0
    grader_errors: Counter = field(default_factory=Counter)


def look(
    config: PrefixConfig,
    rows: Iterable[Row],
    total: int,
    tokenizer: Any,
    *,
    prompt_length: int,
    response_length: int,
    grade: Grade | None = None,
) -> Look:
    """Measure `rows`, a sample of a file of `total` rows, against the limits (tokens, as in verl's `data` section).

    Raises:
        PrefixConfigError: the tokenizer has no chat template, or it cannot render a row.
    """
    found = Look(total)
    # without a limit, so that the overlong ones have a length, too
    demonstrations = DemonstrationTokenizer(tokenizer, sys.maxsize)
    for row in rows:
        found.rows += 1
        found.indices[row.index] += 1
        length = len(prompt_ids(tokenizer, row))
        found.prompt_lens.append(length)
        if length > prompt_length:
            found.overlong_prompts.append(row.number)
        cell = as_list(row.demonstrations)
        usable = []
        for text in cell:
            ids = demonstrations.classify(text)
            if isinstance(ids, str):
                found.unusable[ids] += 1
                continue
            found.demo_lens.append(len(ids))
            if len(ids) + 1 > response_length:
                found.unusable["too_long"] += 1
            else:
                usable.append(text)
        found.empty += not cell
        found.plain += not usable
        if usable and config.sampling.rollouts and keeps_demonstrations(config, row.index):
            found.drawable.append(row)
        if usable and grade is not None:
            _grade(found, row, usable, grade)
    return found


def prompt_ids(tokenizer: Any, row: Row) -> list[int]:
    """The prompt as the rollout server gets it, before the limit is applied.

    Raises:
        PrefixConfigError: the tokenizer has no chat template, or it cannot render the row.
    """
    try:
        return tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:
        raise PrefixConfigError(
            "--tokenizer",
            getattr(tokenizer, "name_or_path", ""),
            f"its chat template cannot render the prompt of row {row.number} ({error}). Name the model's own "
            "tokenizer, or mend the row.",
        ) from error


def _grade(found: Look, row: Row, demonstrations: Sequence[str], grade: Grade) -> None:
    if row.ground_truth is None:
        found.truthless += 1
        return
    for text in demonstrations:
        found.graded += 1
        try:
            reached = grade(row, text) > 0
        except Exception as error:
            found.grader_errors[f"{type(error).__name__}: {error}"[:200]] += 1
            continue
        if not reached:
            found.missed.append(row.number)


def chosen(found: Look, count: int) -> list[Row]:
    """The rows to show: `count` of those that get a prefix, evenly spread."""
    return [found.drawable[i] for i in spread(len(found.drawable), count)]


def warnings(config: PrefixConfig, found: Look, *, prompt_length: int, response_length: int) -> list[str]:
    """One actionable sentence for each thing that is unwise; [] where all is well."""
    warn = []
    demos = len(found.demo_lens) + sum(n for reason, n in found.unusable.items() if reason != "too_long")
    if not config.sampling.rollouts:
        warn.append(f"preset {config.preset} prefixes no rollout (prefix.sampling.rollouts=0); choose prefix_rft.")
    warn += training_data.index_warnings(found.indices)
    if found.plain:
        share = _share(found.plain, found.rows, "row")
        warn.append(
            f"{share} without a usable demonstration ({found.empty} have none at all); training gives them plain "
            "rollouts only. Add demonstrations, or leave it if that is meant."
        )
    for reason, count in found.unusable.most_common():
        share = _share(count, demos, "demonstration")
        if reason == "too_long":
            warn.append(
                f"overlong: {share} of more than {response_length - 1} tokens (longest {max(found.demo_lens)}) cannot "
                f"be used; raise data.max_response_length (--response-length), to {max(found.demo_lens) + 1} for all."
            )
        elif reason == "special_token":
            warn.append(
                f"special tokens: {share} with a special token of the chat template inside cannot be used; it would "
                "end the response there. Remove it from the text."
            )
        else:
            warn.append(f"{share} cannot be used: each {UNUSABLE[reason]}. Remove or mend them.")
    if found.overlong_prompts:
        warn.append(
            f"{_share(len(found.overlong_prompts), found.rows, 'prompt')} of more than {prompt_length} tokens (longest "
            f"{max(found.prompt_lens)}; {_rows(found.overlong_prompts)}): training cuts off their beginning. Raise "
            "data.max_prompt_length (--prompt-length) or set data.filter_overlong_prompts=true."
        )
    if found.missed:
        warn.append(
            f"answer not reached: the grader gives 0 to {_share(len(found.missed), found.graded, 'demonstration')}, "
            f"{_rows(found.missed)}. The text lacks the answer, the answer is wrong, or the run has another grader "
            "(--grader PATH)."
        )
    if found.grader_errors:
        message, _ = found.grader_errors.most_common(1)[0]
        warn.append(
            f"the grader raised on {_share(sum(found.grader_errors.values()), found.graded, 'demonstration')} "
            f"({message}); in training that loses the whole group of rollouts. Mend the grader."
        )
    if found.truthless:
        warn.append(
            f"{_share(found.truthless, found.rows, 'row')} without reward_model.ground_truth: nothing to reward. "
            "Add the answer."
        )
    return warn


def _share(count: int, of: int, what: str) -> str:
    percent = 100 * count / of
    return f"{count} of {of} {what}s ({f'{percent:.0f}' if percent >= 10 else f'{percent:.2g}'} %)"


def _rows(numbers: Sequence[int]) -> str:
    distinct = sorted(set(numbers))
    more = ", ..." if len(distinct) > _NAMED else ""
    return f"row {', '.join(map(str, distinct[:_NAMED]))}{more} of the file"
