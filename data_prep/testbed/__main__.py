"""Make the CPU testbed: `python -m data_prep.testbed --out DIR`. Finished parts are kept, so it can be run again.

Writes `train.parquet`, `val.parquet`, `val_small.parquet`, `model/` and `testbed.json`, which records what was made.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_prep.testbed import task

MANIFEST = "testbed.json"
DATA_FILES = ("train.parquet", "val.parquet", "val_small.parquet")
VAL_SMALL_PER_KIND = 64

VAL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64()), ("kind", pa.string())])),
    ]
)
TRAIN_SCHEMA = VAL_SCHEMA.append(pa.field("demos", pa.list_(pa.string()))).append(
    pa.field("demos_correct", pa.list_(pa.bool_()))
)

console = Console()
app = typer.Typer(add_completion=False, help=__doc__)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; it takes the place of `target` when the block ends without an error."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch / target.name
        if target.is_dir():
            target.rename(scratch / "replaced")
        os.replace(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch)


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with replacing(path) as beside:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), beside)


def make_data(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write the three data files. Returns a record for the manifest."""
    try:
        train = task.train_rows(**config)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    write_rows(out / "train.parquet", train, TRAIN_SCHEMA)
    write_rows(out / "val.parquet", task.val_rows(config["seed"]), VAL_SCHEMA)
    write_rows(out / "val_small.parquet", task.val_rows(config["seed"], VAL_SMALL_PER_KIND), VAL_SCHEMA)
    kinds = [row["extra_info"]["kind"] for row in train]
    shown = task.splits(config["seed"])["train"]["hard"][: config["demonstrations"]]
    wrong = task.mistaken(config["seed"], config["demonstrations"], config["wrong_share"])
    return {
        "rows": {
            "train": {kind: kinds.count(kind) for kind in ("easy", "hard", "hard_demo")},
            "val": len(task.KINDS) * task.PROMPTS_PER_KIND,
            "val_small": len(task.KINDS) * VAL_SMALL_PER_KIND,
        },
        "coverage": {
            "unknown_facts": task.UNKNOWN_FACTS,
            "demonstrated": task.coverage(set(shown) - set(wrong)),
        },
        "wrong_demonstrations": len(wrong),
    }


def make_model(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Pretrain the base model into `model/`, with a progress line. Returns a record for the manifest."""
    from data_prep.testbed import base_model

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, replacing(out / "model") as beside:
        bars: dict[str, Any] = {}

        def report(phase: str, step: int, loss: float, measured: dict[str, float] | None) -> None:
            if phase not in bars:
                for earlier in bars.values():
                    progress.stop_task(earlier)
                bars[phase] = progress.add_task(f"pretraining, {phase}", total=None, status="")
            if measured:
                shown = ", ".join(f"{kind} {value:.2f}" for kind, value in measured.items())
                progress.console.print(f"  {phase} step {step}: loss {loss:.3f}, at T=1 {shown}")
            progress.update(bars[phase], status=f"step {step}, loss {loss:.3f}")

        return base_model.build(beside, config["seed"], report=report)


def read_manifest(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {}


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    with replacing(out / MANIFEST) as beside:
        beside.write_text(json.dumps(manifest, indent=2) + "\n")


def finished(out: Path, manifest: dict[str, Any], part: str, config: dict[str, Any], files: tuple[str, ...]) -> bool:
    """Whether `part` was made before. Made with other settings: refuse, for somebody may be using it."""
    record = manifest.get(part)
    if record is None or not all((out / name).exists() for name in files):
        return False
    if record["config"] != config:
        raise typer.BadParameter(
            f"{out} holds a testbed made with {record['config']}, not {config}: give another --out, or --force."
        )
    return True


def show(out: Path, manifest: dict[str, Any], lines: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data_prep.testbed import base_model

    table = Table("file", "size", "content", title=str(out), title_justify="left")
    rows = manifest["data"]["rows"]
    content = {
        "train.parquet": ", ".join(f"{count} {kind}" for kind, count in rows["train"].items()),
        "val.parquet": f"{rows['val']} rows, no demonstrations",
        "val_small.parquet": f"{rows['val_small']} rows, no demonstrations",
        "model": f"{manifest['model']['parameters']:,} parameters, vocabulary {manifest['model']['vocabulary']}",
    }
    for name, text in content.items():
        path = out / name
        size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
        table.add_row(name, f"{size / 1024:,.0f} KiB", text)
    console.print(table)
    covered, measured = manifest["data"]["coverage"], manifest["model"]["val_accuracy"]
    problem = task.splits(manifest["data"]["config"]["seed"])["train"]["hard"][0]
    model = AutoModelForCausalLM.from_pretrained(out / "model", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(out / "model", trust_remote_code=False)
    written = base_model.sample(model, tokenizer, [problem], seed=0)[0]
    for line in (
        f"demonstrations show {covered['demonstrated']} of {covered['unknown_facts']} unknown facts",
        f"base model on val at T=1: easy {measured['easy']:.3f}, hard {measured['hard']:.4f}",
        *lines,
        f"a hard prompt   {task.render_prompt(problem)}",
        f"demonstration   {task.render_solution(problem)}",
        f"base model      {written}",
    ):
        console.print(line, markup=False, highlight=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it is missing.")],
    seed: Annotated[int, typer.Option(help="Seed of the problems and of the base model.")] = 0,
    demonstrations: Annotated[int, typer.Option(help="Distinct hard prompts that have a demonstration.")] = 64,
    easy_rows: Annotated[int, typer.Option(help="Training rows with easy prompts.")] = 256,
    hard_rows: Annotated[int, typer.Option(help="Training rows with hard prompts without a demonstration.")] = 128,
    demo_rows: Annotated[int, typer.Option(help="Training rows with demonstrated prompts, which repeat.")] = 640,
    wrong_share: Annotated[float, typer.Option(help="Share of the demonstrations that are wrong, unmarked.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Torch threads for pretraining.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Make everything again.")] = False,
) -> None:
    """Make the data files and the base model of the CPU testbed (about a minute on one core)."""
    import torch
    import transformers

    from data_prep.testbed import base_model

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    manifest = {} if force else read_manifest(out)
    mix = {"easy_rows": easy_rows, "hard_rows": hard_rows, "demo_rows": demo_rows, "wrong_share": wrong_share}
    # as JSON has it; a testbed of earlier defaults is not taken for one of these
    pretraining = json.loads(json.dumps(asdict(base_model.PretrainConfig())))
    parts = (
        ("data", make_data, {"seed": seed, "demonstrations": demonstrations, **mix}, DATA_FILES),
        ("model", make_model, {"seed": seed, **pretraining}, ("model",)),
    )
    kept = {name: finished(out, manifest, name, config, files) for name, _, config, files in parts}
    lines = []
    for name, make, config, _ in parts:
        if kept[name]:
            lines.append(f"{name}: kept, made before with the same settings")
            continue
        began = time.monotonic()
        made = make(out, config)
        seconds = round(time.monotonic() - began, 1)
        versions = {package: version(package) for package in ("torch", "transformers", "pyarrow")}
        manifest[name] = {"config": config, **made, "seconds": seconds, "versions": versions}
        write_manifest(out, manifest)
        lines.append(f"{name}: made in {seconds} s")
    show(out, manifest, lines)


if __name__ == "__main__":
    app()
