"""The command `verl-prefix preview`: a look at the data as training will draw it."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import track
from rich.table import Table
from rich.text import Text

from verl_prefix.exceptions import DemonstrationError, PrefixError
from verl_prefix.terminal import elide, printable

if TYPE_CHECKING:
    from verl_prefix.preview import Look, PrefixedRollout

#: characters shown on either side of what is left out of a long text
_PROMPT, _PREFIX, _REST = (400, 200), (80, 200), (160, 80)
_CUT = "▏"


def command(
    file: Annotated[Path, typer.Argument(help="Training file (.parquet, .jsonl).")],
    tokenizer: Annotated[str, typer.Option(help="The policy's model folder or hub id.")],
    preset: Annotated[str, typer.Option(help="As in `+prefix=NAME`.")] = "prefix_rft",
    steps: Annotated[str, typer.Option(help="Training steps, with commas between them.")] = "1,250,500",
    count: Annotated[int, typer.Option("-n", min=1, help="Rows to show, spread over the file.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prefixed rollout on stdout.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="prefix.key=value, as for training.")] = None,
    response_length: Annotated[int, typer.Option(min=2, help="data.max_response_length.")] = 512,
    prompt_length: Annotated[int, typer.Option(min=1, help="data.max_prompt_length.")] = 512,
    sample: Annotated[int, typer.Option(min=0, help="Rows to measure and grade, spread over the file; 0: all.")] = 256,
    grader: Annotated[
        str | None,
        typer.Option(help="The run's reward.custom_reward_function.path (a file, or pkg://...) with compute_score."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write schedule and lengths to this PNG.")] = None,
) -> None:
    """Show prompts with their prefixes as training would draw them at some steps, and warn of what is unwise.

    Needs no GPU, no Ray and no verl. Exit code 1 if training would refuse the file or draw no prefix from it.
    """
    from verl_prefix import presets, preview, preview_rows  # not at the top: `doctor` has to start without NumPy

    errors = Console(stderr=True, soft_wrap=True)
    limits = {"prompt_length": prompt_length, "response_length": response_length}
    wanted_steps = _steps(steps)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result, whatever a grader prints
            config = presets.compose(preset, overrides or ())
            rows, total = preview_rows.read(str(file), config.demonstrations, max(sample, count) if sample else None)
            found, policy_tokenizer = _look(config, rows, total, tokenizer, grader, limits, errors)
            shown = preview.chosen(found, count)
            rollouts = preview.prefixed_rollouts(config, shown, wanted_steps, policy_tokenizer, response_length)
            if picture is not None:
                from verl_prefix import preview_picture

                preview_picture.draw(config, found, rollouts, wanted_steps, picture, **limits)
        for warning in preview.warnings(config, found, **limits):
            _warn(errors, warning)
        if as_json:
            for rollout in rollouts:
                print(json.dumps(rollout.as_dict()))
        else:
            _show(Console(), found, rollouts, policy_tokenizer, limits)
        if config.sampling.rollouts and not rollouts:
            raise DemonstrationError(
                f"{file}: no row of the {found.rows} looked at gets a prefix; training would have none. Mend what the "
                "warnings name, or raise prefix.demonstrations.demo_ratio."
            )
    except PrefixError as error:
        errors.print(Text.assemble(("error ", "bold red"), printable(str(error))))
        raise typer.Exit(1) from error


def _warn(errors: Console, warning: str) -> None:
    errors.print(Text.assemble(("warning ", "yellow"), printable(warning)))


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write whole numbers, e.g. 1,250,500.", param_hint="--steps") from error
    if min(steps) < 1:
        raise typer.BadParameter(f"{text!r}: verl's steps start at 1.", param_hint="--steps")
    return steps


def _look(
    config: Any, rows: list, total: int, tokenizer_path: str, grader: str | None, limits: dict, errors: Console
) -> tuple[Look, Any]:
    from verl_prefix import custom_grader, preview, tokenizers

    try:
        grade = custom_grader.load(grader)
    except PrefixError as error:
        if grader is not None:
            raise
        _warn(errors, f"answers are not graded: {error}")
        grade = None
    tokenizer = tokenizers.load(tokenizer_path)
    bar = track(rows, "tokenising and grading", console=errors, transient=True, disable=not errors.is_terminal)
    return preview.look(config, bar, total, tokenizer, grade=grade, **limits), tokenizer


def highlighted(rollout: PrefixedRollout, tokenizer: Any) -> Text:
    """The demonstration with its prefix highlighted and the cut marked."""
    from verl_prefix.rollout_log import text_boundary

    whole = tokenizer.decode(list(rollout.demo_ids))
    cut = text_boundary(whole, tokenizer.decode(list(rollout.demo_ids[: rollout.draw.prefix_len])))
    return Text.assemble(
        (printable(elide(whole[:cut], *_PREFIX)), "bold green"),
        (_CUT, "bold red"),
        (printable(elide(whole[cut:], *_REST)), "dim"),
    )


def _show(console: Console, found: Look, rollouts: list, tokenizer: Any, limits: dict[str, int]) -> None:
    table = Table(box=None, padding=(0, 1))
    for name in ("tokens", "count", "shortest", "median", "longest", "limit"):
        table.add_column(name, justify="left" if name == "tokens" else "right")
    for what, lengths, limit in (
        ("prompts", sorted(found.prompt_lens), limits["prompt_length"]),
        ("demonstrations", sorted(found.demo_lens), limits["response_length"] - 1),
    ):
        cells = (lengths[0], lengths[len(lengths) // 2], lengths[-1]) if lengths else ("-",) * 3
        table.add_row(what, *map(str, (len(lengths), *cells, limit)))
    console.print(f"{found.rows} of {found.total} rows looked at, {len(found.drawable)} of them get prefixes")
    console.print(table)
    row = None
    for rollout in rollouts:
        if rollout.row is not row:
            row = rollout.row
            console.print()
            console.rule(Text(printable(f"row {row.number} of the file, index {row.index}")), align="left")
            for message in row.prompt:
                content = elide(str(message["content"]), *_PROMPT)
                console.print(Text.assemble((printable(f"{message['role']} "), "bold"), printable(content)))
        draw = rollout.draw
        band = f"low {draw.low:.3f}, high {draw.high:.3f}, drawn {draw.ratio:.3f}"
        console.print(
            f"step {rollout.step}, rollout {rollout.session}: prefix {draw.prefix_len}/{draw.demo_len} tokens, {band}",
            style="cyan",
            highlight=False,
        )
        console.print(Padding(highlighted(rollout, tokenizer), (0, 0, 0, 2), expand=False))
