"""The converter: what it keeps, marks, drops and counts; and that verl and the plugin read what it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from typer.testing import CliRunner

from data_prep import convert as conversion
from data_prep import reading, rows, sources, tokens
from data_prep.answers import normalise, of_solution
from data_prep.cli import app
from data_prep.rules import Answer, Chat, Demos, Question
from verl_prefix import training_data
from verl_prefix.config import PrefixConfig
from verl_prefix.demonstrations import DemonstrationTokenizer

ROOT = Path(__file__).resolve().parents[1]


def jsonl(path, *raw):
    path.write_text("".join(json.dumps(row) + "\n" for row in raw))
    return path


def question(i, demos=("So \\boxed{7}.",), **columns):
    return {"q": f"What is {i}?", "a": "7", "d": list(demos), **columns}


@dataclass(frozen=True)
class Grade:
    score: float
    reason: str


def looks_for_seven(pairs):
    """A grader that finds right what has a 7 in it."""
    for response, truth in pairs:
        assert truth == "7"
        yield Grade(1.0, "correct") if "7" in response else Grade(0.0, "wrong")


SOURCE = sources.Source("own", None, "mine", Question("q"), Answer("a"), Demos(("d",)), think=sources.open_think)


def convert(tmp_path, *raw, source=SOURCE, **options):
    injected = {key: options.pop(key) for key in ("grade", "count_tokens") if key in options}
    shard = reading.open_file(jsonl(tmp_path / "own.jsonl", *raw))
    out = tmp_path / "own.parquet"
    report = conversion.convert(source, [shard], out, conversion.Options(**options), **injected)
    return report, pq.read_table(out).to_pylist()


def cli(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


# --- verification


def test_without_a_grader_nothing_is_said_about_correctness(tmp_path):
    _, (row,) = convert(tmp_path, question(0))
    assert row["demos_correct"] == []


def test_grader_marks(tmp_path):
    report, (row,) = convert(tmp_path, question(0, ["7", "8", "17"]), grade=looks_for_seven)
    assert row["demos"] == ["7", "8", "17"]
    assert row["demos_correct"] == [True, False, True]
    assert (report.right, report.wrong, report.grades["wrong"]) == (2, 1, 1)


def test_grader_drops(tmp_path):
    report, found = convert(
        tmp_path, question(0, ["7", "8"]), question(1, ["8"]), grade=looks_for_seven, drop_wrong=True
    )
    assert [row["demos"] for row in found] == [["7"], []]
    assert [row["demos_correct"] for row in found] == [[True], []]
    assert report.demos_dropped["wrong"] == 2
    assert report.demos == 1


@pytest.mark.parametrize(
    ("demo", "graded"),
    [
        ("<think>\n8\n</think>\n\n7", "7"),
        ("8</think>7", "7"),
        ("<think>\n7", ""),  # never answers
        ("7", "7"),
    ],
)
def test_an_answer_inside_the_thinking_does_not_count(tmp_path, demo, graded):
    seen = []

    def grade(pairs):
        for response, _ in pairs:
            seen.append(response.strip())
            yield Grade(1.0, "correct")

    convert(tmp_path, question(0, [demo]), grade=grade)
    assert seen == [graded]


def test_verify_with_the_grader_itself(tmp_path):
    demos = ["\\boxed{\\frac12}", "\\boxed{0.5}", "\\boxed{2}", "no box", "\\boxed{9^{99999999}}"]
    file = jsonl(tmp_path / "own.jsonl", question(0, demos, a="1/2"))
    columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    for verify, marks in (("mark", [True, True, False, False, False]), ("drop", [True, True])):
        cli("convert", "--source", file, *columns, "--out", tmp_path / "o.parquet", "--verify", verify)
        (row,) = pq.read_table(tmp_path / "o.parquet").to_pylist()
        assert row["demos_correct"] == marks
        assert row["demos"] == demos[: len(marks)]
    assert "no_answer" in (tmp_path / "o_card.md").read_text()


def test_rows_left_without_demonstration_can_be_dropped(tmp_path):
    raw = question(0, ["7"]), question(1, ["8"]), question(2, [])
    report, found = convert(tmp_path, *raw, grade=looks_for_seven, drop_wrong=True, require_demos=True)
    assert [row["extra_info"]["row"] for row in found] == [0]
    assert [row["extra_info"]["index"] for row in found] == [rows.first_index("own", "What is 0?")]
    assert report.rows_dropped["no demonstration is left"] == 2


def test_grader_overrules_the_flags_of_the_file(tmp_path):
    source = sources.Source("own", None, "", Question("q"), Answer("a"), Demos(("d",), correct="c"))
    raw = question(0, ["7", "8"], c=[False, True])
    assert convert(tmp_path, raw, source=source)[1][0]["demos_correct"] == [False, True]
    assert convert(tmp_path, raw, source=source, grade=looks_for_seven)[1][0]["demos_correct"] == [True, False]


def test_card_counts_add_up(tmp_path):
    raw = [question(i, ["7", "8", "", None]) for i in range(10)] + [question(3)]
    report, found = convert(tmp_path, *raw, grade=looks_for_seven)
    assert report.read == report.written + sum(report.rows_dropped.values()) == 11
    assert len(found) == report.written == 10
    assert report.demos + sum(report.demos_dropped.values()) == 40
    card = (tmp_path / "own_card.md").read_text()
    for line in (
        "| rows read | 11 |",
        "| rows written | 10 |",
        "| demonstrations | 20 |",
        "| of them right | 10 |",
        "10 demonstrations: empty (first: own.jsonl row 0, own.jsonl row 1, own.jsonl row 2)",
        "10 demonstrations: null",
        "1 row: its question was there before (first: own.jsonl row 10)",
        "licence of the source: mine",
    ):
        assert line in card, line
    assert json.loads((tmp_path / "own_example.json").read_text()) == found[0]


# --- lengths and think format


def test_token_counts_are_those_of_training(tmp_path, tokenizer_folder):
    tokenizer = tokens.load(str(tokenizer_folder))
    texts = ["So \\boxed{7}.", "ä" * 5, "a  b\n"]
    _, (row,) = convert(tmp_path, question(0, texts), count_tokens=tokens.counter(tokenizer))
    classify = DemonstrationTokenizer(tokenizer, response_length=100).classify
    assert row["demos_tokens"] == [len(classify(text)) for text in texts] == [13, 10, 5]


def test_long_demonstrations_are_dropped_by_tokens(tmp_path):
    report, (row,) = convert(tmp_path, question(0, ["abc", "abcd"]), count_tokens=lambda t: map(len, t), max_tokens=3)
    assert (row["demos"], row["demos_tokens"]) == (["abc"], [3])
    assert report.demos_dropped["longer than 3 tokens"] == 1


def test_a_demonstration_of_ten_megabytes(tmp_path):
    """It fits no response limit: dropped and named in the card, the rest is kept."""
    report, found = convert(tmp_path, question(0, ["x" * 10_000_000, "7"]), question(1))
    assert [len(row["demos"]) for row in found] == [1, 1]
    assert report.demos_dropped["longer than 1,000,000 characters"] == 1
    assert "characters (first: own.jsonl row 0)" in (tmp_path / "own_card.md").read_text()


@pytest.mark.parametrize(
    ("strip", "demo", "stored"),
    [
        (False, "<think>\nHm.\n</think>\n\n7", "<think>\nHm.\n</think>\n\n7"),
        (False, "Hm.\n</think>\n\n7", "<think>\nHm.\n</think>\n\n7"),
        (True, "<think>\nHm.\n</think>\n\n7", "Hm.\n</think>\n\n7"),
        (True, "Hm.\n</think>\n\n7", "Hm.\n</think>\n\n7"),
        (True, "7", "7"),
    ],
)
def test_think_format(tmp_path, strip, demo, stored):
    _, (row,) = convert(tmp_path, question(0, [demo]), strip_opener=strip)
    assert row["demos"] == [stored]


@pytest.mark.parametrize(("ending", "strips"), [("<think>\n", True), ("", False)])
def test_think_auto_follows_the_chat_template(tmp_path, tokenizer_folder, ending, strips):
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    opener = "{%- if add_generation_prompt -%}{{- '<|im_start|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(opener, opener + ending.replace("\n", "\\n"))
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text((tokenizer_folder / "config.json").read_text())
    file = jsonl(tmp_path / "own.jsonl", question(0, ["<think>\nHm.\n</think>\n\n7"]))
    columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    cli("convert", "--source", file, *columns, "--out", tmp_path / "x.parquet", "--tokenizer", model)
    (row,) = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert row["demos"][0].startswith("<think>") is not strips


# --- prompts and duplicates


@pytest.mark.parametrize(
    ("prompt", "options", "messages"),
    [
        ("2?", {}, [("user", f"2?\n\n{sources.BOXED}")]),
        ("2?", {"instruction": ""}, [("user", "2?")]),
        ("2?", {"instruction": "Now.", "system": "S"}, [("system", "S"), ("user", "2?\n\nNow.")]),
        ([("user", "2?")], {"instruction": "Now."}, [("user", "2?")]),
        ([("system", "old"), ("user", "2?")], {"system": "S"}, [("system", "S"), ("user", "2?")]),
    ],
)
def test_prompts(tmp_path, prompt, options, messages):
    source = sources.Source("own", None, "", Chat("q"), Answer("a"))
    if isinstance(prompt, list):
        prompt = [{"role": role, "content": content} for role, content in prompt]
    _, (row,) = convert(tmp_path, question(0, q=prompt), source=source, **options)
    assert row["prompt"] == [{"role": role, "content": content} for role, content in messages]
    assert row["extra_info"]["question"] == "2?"


def test_duplicates_are_dropped_whatever_case_and_spacing(tmp_path):
    raw = question(0, q="What  is it?"), question(1, q="what is\nIT? "), question(2, q="What is not it?")
    assert [row["extra_info"]["row"] for row in convert(tmp_path, *raw)[1]] == [0, 2]
    assert len(convert(tmp_path, *raw, keep_duplicates=True)[1]) == 3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_dedup_keeps_the_first_of_each(tmp_path_factory, numbers):
    _, found = convert(tmp_path_factory.mktemp("dedup"), *(question(number) for number in numbers))
    assert [row["extra_info"]["row"] for row in found] == sorted(
        {number: numbers.index(number) for number in numbers}.values()
    )


def test_rows_are_numbered_across_batches_and_shards(tmp_path):
    shards = [
        reading.open_file(jsonl(tmp_path / f"{part}.jsonl", *(question(f"{part}{i}") for i in range(300))))
        for part in range(2)
    ]
    conversion.convert(SOURCE, shards, tmp_path / "o.parquet", conversion.Options())
    infos = pq.read_table(tmp_path / "o.parquet")["extra_info"].to_pylist()
    assert [info["index"] for info in infos] == [rows.first_index("own", "What is 00?") + i for i in range(600)]
    assert [info["row"] for info in infos] == [*range(300), *range(300)]


def test_files_converted_one_by_one_have_numbers_of_their_own(tmp_path):
    """Two files of one format and one name would otherwise share draws, and `law=adaptive`'s memory of a row."""
    indices = []
    for part in range(2):
        folder = tmp_path / str(part)
        folder.mkdir()
        file = jsonl(folder / "own.jsonl", *(question(f"{part}{i}") for i in range(3)))
        columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
        cli("convert", "--source", file, *columns, "--out", folder / "o.parquet")
        indices += [info["index"] for info in pq.read_table(folder / "o.parquet")["extra_info"].to_pylist()]
    assert len(set(indices)) == 6


def test_limit(tmp_path):
    report, found = convert(tmp_path, *(question(i) for i in range(600)), limit=300)
    assert report.read == len(found) == 300


# --- answers


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ("\\boxed{204}", "204"),
        ("$\\frac12$", "\\frac12"),
        ("$$7$$", "7"),
        ("$1$ or $2$", "$1$ or $2$"),
        ("work\n#### 18", "18"),
        ("  7 ", "7"),
        ("", None),
        ("\\boxed{}", None),
        ("\\boxed 3", "3"),
        ('["\\\\frac12"]', "\\frac12"),
        ('["1", "$x$"]', '["1", "x"]'),
        ("[0, 1]", "[0, 1]"),
        ("\\boxed{1} and \\boxed{\\{1,\\}2}", "\\{1,\\}2"),
    ],
)
def test_answer_cells(cell, answer):
    assert normalise(cell) == answer


@given(st.recursive(st.sampled_from(["x", "1", "\\{", "\\frac"]), lambda part: part.map(lambda p: "{" + p + "}x")))
def test_the_last_box_keeps_nested_braces(content):
    assert of_solution(f"\\boxed{{no}} so \\boxed{{{content}}}. End {{") == content


# --- own files


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_own_files(tmp_path, suffix):
    file = tmp_path / f"mine.{suffix}"
    raw = [{"q": f"{i}?", "a": "7", "d": 'So, "\\boxed{7}".\nDone'} for i in range(3)]
    if suffix == "csv":
        import csv

        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, ["q", "a", "d"])
            writer.writeheader()
            writer.writerows(raw)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(raw), file)
    else:
        file.write_text(json.dumps(raw) if suffix == "json" else "\n".join(map(json.dumps, raw)))
    columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    cli("convert", "--source", file, *columns, "--out", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["demos"] for row in found] == [[row["d"]] for row in raw]
    assert {row["data_source"] for row in found} == {"mine"}


def test_several_shards_by_a_glob(tmp_path):
    for part in range(3):
        jsonl(tmp_path / f"part-{part}.jsonl", question(part))
    columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    cli("convert", "--source", tmp_path / "part-*.jsonl", *columns, "--out", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["extra_info"]["question"] for row in found] == ["What is 0?", "What is 1?", "What is 2?"]


def test_own_evaluation_file_has_no_demonstrations(tmp_path):
    file = jsonl(tmp_path / "own.jsonl", question(0))
    columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    cli("convert", "--source", file, *columns, "--evaluation", "--out", tmp_path / "out.parquet")
    assert "demos" not in pq.read_schema(tmp_path / "out.parquet").names


# --- what reads the output


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """The testbed's byte-level tokenizer, saved as beside a model."""
    from transformers import Qwen2Config

    from data_prep.testbed.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    Qwen2Config().save_pretrained(folder)
    build_tokenizer(4096).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(training file, evaluation file) of the converter."""
    folder = tmp_path_factory.mktemp("converted")
    _, raw = convert(folder, *(question(i, [f"{i} so \\boxed{{7}}.", "It is 8"][: i % 3]) for i in range(12)))
    assert raw
    file = jsonl(folder / "aime.jsonl", *({"problem": f"{i}?", "answer": str(i)} for i in range(4)))
    cli("convert", "--source", "aime24", "--from", file, "--out", folder / "aime24.parquet")
    return folder / "own.parquet", folder / "aime24.parquet"


def test_verl_reads_it(converted, tokenizer_folder, tmp_path):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = tokens.load(str(tokenizer_folder))
    config = OmegaConf.create(
        {"cache_dir": str(tmp_path), "max_prompt_length": 512, "filter_overlong_prompts_workers": 1}
    )
    for file in converted:
        data = RLHFDataset([str(file)], tokenizer, config)
        assert len(data) == pq.read_metadata(file).num_rows
        item = data[1]
        assert item["raw_prompt"] == pq.read_table(file)["prompt"].to_pylist()[1]
        assert item["index"] == pq.read_table(file)["extra_info"].to_pylist()[1]["index"]
        assert item["reward_model"]["ground_truth"]
    assert list(RLHFDataset([str(converted[0])], tokenizer, config)[2]["demos"]) == ["2 so \\boxed{7}.", "It is 8"]


def test_the_start_up_check_is_silent(converted, tokenizer_folder):
    tokenizer = tokens.load(str(tokenizer_folder))
    train, evaluation = map(str, converted)
    found = training_data.check(
        PrefixConfig(), train_files=[train], val_files=[evaluation], tokenizer=tokenizer, response_length=64
    )
    assert found == []


def test_the_start_up_check_refuses_a_training_file_for_validation(converted, tokenizer_folder):
    tokenizer = tokens.load(str(tokenizer_folder))
    train = str(converted[0])
    with pytest.raises(training_data.DemonstrationError, match="validation row"):
        training_data.check(
            PrefixConfig(), train_files=[train], val_files=[train], tokenizer=tokenizer, response_length=64
        )


def test_sft_export_is_read_by_verl(converted, tokenizer_folder, tmp_path):
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    out = tmp_path / "sft.parquet"
    cli("sft", converted[0], "--out", out)
    train, found = pq.read_table(converted[0]).to_pylist(), pq.read_table(out).to_pylist()
    demos = [(row["extra_info"]["index"], demo) for row in train for demo in row["demos"]]
    assert [(row["extra_info"]["index"], row["messages"][-1]["content"]) for row in found] == demos
    tokenizer = tokens.load(str(tokenizer_folder))
    config = OmegaConf.create({"max_length": 1024, "pad_mode": "no_padding", "ignore_input_ids_mismatch": True})
    data = MultiTurnSFTDataset([str(out)], tokenizer, config)
    assert len(data) == len(demos)
    item = data[0]
    learned = tokenizer.decode(item["input_ids"][item["loss_mask"].bool()])
    assert demos[0][1] in learned
    assert train[1]["prompt"][0]["content"] not in learned


def test_sft_export_leaves_the_wrong_ones_out(tmp_path):
    convert(tmp_path, question(0, ["8", "7", "17"]), question(1, ["8"]), grade=looks_for_seven)
    for options, texts in (((), ["7", "17"]), (("--first-only",), ["7"])):
        cli("sft", tmp_path / "own.parquet", "--out", tmp_path / "sft.parquet", *options)
        found = pq.read_table(tmp_path / "sft.parquet").to_pylist()
        assert [row["messages"][-1] for row in found] == [{"role": "assistant", "content": text} for text in texts]


# --- stopped half-way


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_the_earlier_output(tmp_path, kill):
    out = tmp_path / "out.parquet"
    columns = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")
    cli("convert", "--source", jsonl(tmp_path / "few.jsonl", question(0)), *columns, "--out", out)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    script = (
        "import sys, itertools; from data_prep import cli, reading\n"
        "def endless(file):\n"
        "    rows = lambda: ({'q': f'{i}?', 'a': '7', 'd': 'x' * 1000} for i in itertools.count())\n"
        "    return reading._from_rows(str(file), rows)\n"
        "reading.open_file = endless\n"
        "cli.app(sys.argv[1:])"
    )
    arguments = ["convert", "--source", tmp_path / "few.jsonl", *columns, "--out", out]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # a shell's background jobs ignore SIGINT, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size > 1000 for part in tmp_path.glob(".out.parquet.*.part")):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(kill)
        assert child.wait(30) != 0
    finally:
        child.kill()
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir() if not file.name.endswith(".part")}
    assert left == before
    parts = list(tmp_path.glob(".*.part"))
    assert bool(parts) is (kill == signal.SIGKILL)
    cli("convert", "--source", tmp_path / "few.jsonl", *columns, "--out", out)
    assert not list(tmp_path.glob(".*.part"))
