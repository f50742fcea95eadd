"""Training prompts that are in an evaluation set: what counts as the same, what does not, and what --drop leaves."""

from __future__ import annotations

import json
from itertools import zip_longest

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.decontaminate import EvaluationIndex, exact_key, ngrams

LEAK = "Let $ABC$ be a triangle with sides 13, 14 and 15, and let $D$ be the foot of the altitude. Find $AD$."


def cli(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def make(tmp_path):
    """make(name, source, questions) -> converted file."""

    def convert(name, source, questions):
        column = {"aime24": "problem", "limo": "question", "amc23": "question"}[source]
        raw = tmp_path / f"{name}.jsonl"
        rows = [{column: question, "answer": "12", "solution": "It is \\boxed{12}."} for question in questions]
        raw.write_text("\n".join(map(json.dumps, rows)))
        cli("convert", "--source", source, "--from", raw, "--out", tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    return convert


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        (LEAK, "exact"),
        (LEAK.replace("$", "").replace("  ", " ").upper(), "exact"),
        (LEAK.replace("13, 14", "13,\\, 14").replace("Find", "\n\nFind").rstrip("."), "exact"),
        ("In a contest it said: " + LEAK[:-9] + "Prove that it is 12.", "ngram"),
        (LEAK.replace("sides", "edges").replace("altitude", "median"), None),
        ("What is 1 - 1?", None),
        ("What is 1 + 1?", "exact"),
        ("What is 1 + 12?", None),
    ],
)
def test_what_matches(question, kind):
    index = EvaluationIndex(n=13)
    index.add("e", iter([LEAK, "What is $1+1$?"]))
    found = index.find(question)
    assert (found and found[2]) == kind


def test_the_instruction_is_no_match(make, tmp_path):
    """The same instruction stands behind every prompt; with the last word before it, it would make 13 words."""
    evaluation = make("aime", "aime24", ["For all real numbers x there is a y; find m+n"])
    train = make("train", "limo", ["A different thing altogether; find m+n"])
    assert "0 of 1 training rows match" in cli("decontaminate", train, "--against", evaluation)


def test_a_figure_of_speech_is_no_match():
    phrase = "can be written as m over n where m and n are relatively prime positive integers find m plus n"
    index = EvaluationIndex(n=13)
    index.add("e", iter(f"Problem {i}: the area of figure {i} {phrase}" for i in range(20)))
    assert index.find(f"Something new whose length {phrase}") is None
    assert index.find(f"Problem 3: the area of figure 3 {phrase}")[1:] == (3, "exact")


def test_a_prompt_repeated_for_avg_at_k_is_no_figure_of_speech():
    index = EvaluationIndex(n=13)
    index.add("e", iter([LEAK] * 32))
    assert index.find("In a contest it said: " + LEAK[:-9] + "Prove that it is 12.") == ("e", 0, "ngram")
    assert index.files == {"e": 32}


def test_report_and_drop(make, tmp_path):
    aime = make("aime", "aime24", ["What is 5?", LEAK])
    amc = make("amc", "amc23", ["What is 6?"])
    train = make("train", "limo", ["What is 4?", LEAK, "what is 6 ?", "What is 7?", "Oh: " + LEAK])
    out, report = tmp_path / "clean.parquet", tmp_path / "report.jsonl"
    both = ("--against", aime, "--against", amc)
    assert "3 of 5 training rows match" in cli("decontaminate", train, *both, "--report", report)
    found = [json.loads(line) for line in report.read_text().splitlines()]
    first = pq.read_table(train)["extra_info"].to_pylist()[0]["index"]
    assert [(m["train_row"], m["evaluation_file"], m["evaluation_row"], m["kind"]) for m in found] == [
        (1, "aime.parquet", 1, "exact"),
        (2, "amc.parquet", 0, "exact"),
        (4, "aime.parquet", 1, "ngram"),
    ]
    assert [m["train_index"] for m in found] == [first + 1, first + 2, first + 4]
    cli("decontaminate", train, "--against", tmp_path / "a*.parquet", "--drop", "--out", out)
    before, after = pq.read_table(train), pq.read_table(out)
    assert after.to_pylist() == [before.to_pylist()[i] for i in (0, 3)]
    assert after.schema.equals(before.schema, check_metadata=True)
    assert "0 of 2 training rows match" in cli("decontaminate", out, *both)


def test_files_of_others_are_compared_by_their_last_turn(make, tmp_path):
    import pyarrow as pa

    evaluation = make("aime", "aime24", [LEAK])
    wrapped = f"{LEAK} Let's think step by step and output the final answer within \\boxed{{}}."
    rows = [{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": wrapped}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "theirs.parquet")
    assert "1 of 1 training rows match" in cli("decontaminate", tmp_path / "theirs.parquet", "--against", evaluation)


@given(st.lists(st.sampled_from(["a", "B", "+", "1"])), st.lists(st.sampled_from([" ", "$", "\\,", "\\left", "\n"])))
def test_exact_key_ignores_spacing(symbols, spacing):
    spaced = "".join(f"{symbol}{space} " for symbol, space in zip_longest(symbols, spacing, fillvalue=""))
    assert exact_key(spaced) == "".join(symbols).lower()


@given(st.lists(st.sampled_from("abc"), max_size=8), st.integers(2, 5))
def test_ngrams(words, n):
    listed = [" ".join(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]
    assert ngrams(" ".join(words), n) == set(listed)
