"""The command `verl-prefix extend-context`: a copy of a model with a longer context."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verl_prefix import context
from verl_prefix.exceptions import PrefixConfigError


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder with config.json and weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to make.")],
    rope_theta: Annotated[float, typer.Option(min=1.0, help="Base of the rotary embeddings.")] = 40000.0,
    positions: Annotated[int, typer.Option(min=1, help="max_position_embeddings.")] = 16384,
) -> None:
    """Copy a model with another rotary base and more positions, weights linked. Defaults: the papers' Qwen2.5-Math."""
    try:
        config = context.extend(model, out, rope_theta=rope_theta, positions=positions)
    except PrefixConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{out}: rope_theta {rope_theta:g}, {config['max_position_embeddings']} positions, weights of {model}")
