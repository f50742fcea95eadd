r"""Rows per second and peak memory of the converter, against `datasets.map` with one process per row function.

    python benchmarks/bench_data.py                        # 46,000 rows of about 20 kB, OpenR1-Math-46k's shape
    python benchmarks/bench_data.py --tokenizer MODEL --grade   # with the shares that tokenising and grading take
    python benchmarks/bench_data.py --small                # 1.8 M small rows, DAPO's size: peak memory

Both sides read the same parquet, make the same rows with one function each, and write parquet. The baseline is what
the usual preparation script does: `load_dataset("parquet")`, `map(function)` in one process, `to_parquet`. Its time is
given as a whole and for `map` alone. `--small --unique` gives every row a question of its own, the worst case for
deduplication; without it each comes 100 times, as in DAPO-Math-17k.

Each measurement runs in a fresh process, and both sides import `datasets` before the clock starts. Peak memory is the
resident set's high-water mark (`getrusage`), imports included; memory-mapped pages of `datasets`' cache count as far as
they are resident. Tokenising and grading are measured on `--part` rows and scaled: all would take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = (
    "let we have so then $x^2+y^2$ therefore \\frac{1}{2} wait the triangle is angle check again because equation "
    "substitute both sides sum of roots gives \\sqrt{3} hence number integer positive find value let's see"
)
STRING = pa.string()
TURNS = pa.list_(pa.struct([("content", STRING), ("role", STRING)]))
REWARD = pa.struct([("ground_truth", STRING), ("style", STRING)])


def make_openr1(file: Path, rows: int, kilobytes: int) -> None:
    """Rows in the shape of Elliott/Openr1-Math-46k-8192, written a thousand at a time."""
    rng = random.Random(0)
    info = pa.struct([("index", pa.int64()), ("split", STRING)])
    schema = pa.schema(
        [
            *(("data_source", STRING), ("prompt", TURNS), ("target", TURNS)),
            *(("ability", STRING), ("reward_model", REWARD), ("extra_info", info)),
        ]
    )
    body = " ".join(rng.choices(TEXT.split(), k=4_000_000))
    system = "Your task is to think first, between <think> and </think>, and then to answer in \\boxed{}. " * 8

    def row(i: int) -> dict:
        length = rng.randint(kilobytes * 300, kilobytes * 1700)
        start = rng.randrange(len(body) - length)
        # one answer in four is spelled differently from the truth, so that the grader has to do algebra
        answer, truth = (f"1+\\sqrt{{{i}}}", f"\\sqrt{{{i}}}+1") if i % 4 == 0 else (str(i), str(i))
        thinking = f"<think>\n{body[start : start + length]}\n</think>\n\nIt is \\boxed{{{answer}}}."
        question = f"Problem {i}: {body[start : start + 300]}"
        return {
            "data_source": "openr1",
            "prompt": [{"content": system, "role": "system"}, {"content": question, "role": "user"}],
            "target": [{"content": thinking, "role": "assistant"}],
            "ability": "math",
            "reward_model": {"ground_truth": truth, "style": "rule"},
            "extra_info": {"index": i, "split": "default"},
        }

    with pq.ParquetWriter(file, schema) as writer:
        for first in range(0, rows, 1000):
            listed = [row(i) for i in range(first, min(first + 1000, rows))]
            writer.write_table(pa.Table.from_pylist(listed, schema=schema))


def make_dapo(file: Path, rows: int, different: int) -> None:
    """Rows in the shape of BytedTsinghua-SIA/DAPO-Math-17k with so many different questions."""
    schema = pa.schema(
        [
            *(("data_source", STRING), ("prompt", TURNS), ("ability", STRING), ("reward_model", REWARD)),
            ("extra_info", pa.struct([("index", STRING)])),
        ]
    )

    def row(i: int) -> dict:
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": f"Find the sum of the digits of {i % different}.", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(i % 97), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{i:032x}"},
        }

    with pq.ParquetWriter(file, schema) as writer:
        for first in range(0, rows, 50_000):
            listed = [row(i) for i in range(first, min(first + 50_000, rows))]
            writer.write_table(pa.Table.from_pylist(listed, schema=schema))


def baseline_row(row: dict, number: int) -> dict:
    """What a preparation script's row function does, to the same columns as the converter's."""
    demo = row["target"][0]["content"]
    if "</think>" in demo and not demo.lstrip().startswith("<think>"):
        demo = "<think>\n" + demo.lstrip()
    return {
        "data_source": row["data_source"],
        "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]],
        "ability": row["ability"],
        "reward_model": {"ground_truth": row["reward_model"]["ground_truth"].strip(), "style": "rule"},
        "extra_info": {"index": number, "split": "train", "row": number, "question": row["prompt"][-1]["content"]},
        "solution": "",
        "demos": [demo],
        "demos_correct": [],
        "demos_tokens": [],
        "demos_steps": [[]],
    }


def run_baseline(file: Path, folder: Path) -> dict:
    import datasets

    from data_prep import rows

    datasets.disable_progress_bars()
    features = rows.features(evaluation=False)
    began = time.perf_counter()
    data = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(folder / "cache"))["train"]
    loaded = time.perf_counter()
    mapped = data.map(baseline_row, with_indices=True, remove_columns=["target"], features=features)
    done = time.perf_counter()
    mapped.to_parquet(str(folder / "out.parquet"))
    return {"seconds": time.perf_counter() - began, "map_seconds": done - loaded, "rows": len(mapped)}


def run_converter(file: Path, folder: Path, options: argparse.Namespace) -> dict:
    from data_prep import convert as conversion
    from data_prep import reading, rows, sources, tokens

    source = sources.SOURCES["dapo-17k" if options.small else "openr1-46k"]
    count = tokens.counter(tokens.load(options.tokenizer)) if options.measure == "tokenising" else None
    pool = None
    if options.measure == "grading":
        from verl_prefix.grading.pool import GraderPool

        pool = GraderPool(workers=options.workers)
    limit = 0 if options.measure == "converter" else options.part
    rows.features(evaluation=False)
    began = time.perf_counter()
    report = conversion.convert(
        source,
        [reading.open_file(file)],
        folder / "out.parquet",
        conversion.Options(limit=limit),
        grade=pool.map if pool else None,
        count_tokens=count,
    )
    seconds = time.perf_counter() - began
    if pool:
        pool.close()
    spent = report.seconds[options.measure]
    result = {"seconds": seconds, "rows": report.read, "written": report.written, "spent": spent}
    return {**result, "grades": dict(report.grades), "tokens": sum(report.lengths.get("demonstration, tokens", ()))}


def child(options: argparse.Namespace) -> None:
    import datasets  # noqa: F401

    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before = cpu_seconds()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.measure == "baseline":
            result = run_baseline(options.file, Path(folder))
        else:
            result = run_converter(options.file, Path(folder), options)
    result["cpu_seconds"] = cpu_seconds() - before
    result["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


def measure(kind: str, file: Path, folder: Path) -> dict:
    """One run in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind, "--file", str(file), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, result: dict) -> None:
    rate, cpu = result["rows"] / result["seconds"], result["cpu_seconds"]
    print(
        f"{name:32s} {rate:9,.0f} rows/s {result['seconds']:7.1f} s, of CPU {cpu:6.1f} s, "
        f"peak {result['peak_MB']:6,.0f} MB",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The converter against datasets.map.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=0, help="rows; 0: 46,000, or 1,800,000 with --small")
    parser.add_argument("--kilobytes", type=int, default=20, help="mean length of a demonstration")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the fastest counts")
    parser.add_argument("--small", action="store_true", help="small rows without demonstrations, the converter alone")
    parser.add_argument("--unique", action="store_true", help="with --small: no question comes twice")
    parser.add_argument("--tokenizer", help="model folder; measures tokenising")
    parser.add_argument("--grade", action="store_true", help="measure grading")
    parser.add_argument("--part", type=int, default=4000, help="rows to tokenise and to grade")
    parser.add_argument("--workers", type=int, default=2, help="grader processes")
    for hidden, kind in (("--measure", str), ("--file", Path), ("--folder", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.measure:
        child(options)
        return
    rows = options.rows or (1_800_000 if options.small else 46_000)
    need = rows * (1 if options.small else options.kilobytes * 4) * 1024
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < need:
        raise SystemExit(f"{tempfile.gettempdir()}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free. Set TMPDIR.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "source.parquet"
        if options.small:
            make_dapo(file, rows, rows if options.unique else rows // 100)
            result = measure("converter", file, folder)
            show(f"converter, {result['written']:,} unique", result)
            return
        make_openr1(file, rows, options.kilobytes)
        print(f"{rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB of parquet")
        # in turns, so that both meet the same neighbours on a shared machine
        turns = [
            (measure("converter", file, folder), measure("baseline", file, folder)) for _ in range(options.repeats)
        ]
        converter, baseline = (min(runs, key=lambda run: run["seconds"]) for runs in zip(*turns, strict=True))
        show("converter", converter)
        show("datasets: load, map, to_parquet", baseline)
        print(
            f"  of it map alone {baseline['map_seconds']:.1f} s\n"
            f"times faster: {baseline['seconds'] / converter['seconds']:.1f}; than map alone "
            f"{baseline['map_seconds'] / converter['seconds']:.1f}; in CPU time "
            f"{baseline['cpu_seconds'] / converter['cpu_seconds']:.1f}; load average "
            + ", ".join(f"{load:.1f}" for load in os.getloadavg()),
            flush=True,
        )
        for kind, wanted in (("tokenising", options.tokenizer), ("grading", options.grade)):
            if wanted:
                result = measure(kind, file, folder)
                share = result["spent"] / result["seconds"]
                print(
                    f"{kind}: {result['spent'] / result['rows'] * 1e3:.2f} ms a row on {result['rows']:,} rows, "
                    f"{share:.0%} of the time with it ({result['tokens']:,} tokens, {result['grades']})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
