"""Bad input: the error names file, row, column and mend, and an earlier output stays as it was."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_prep import convert as conversion
from data_prep import decontaminate, reading, sources, writing
from data_prep.cli import app
from data_prep.errors import DataError
from data_prep.rules import Answer, Demos, Question

GOOD = {"q": "1+1=?", "a": "2", "d": ["It is \\boxed{2}."]}
MORE = {**GOOD, "q": "1+2=?"}
COLUMNS = ("--prompt-column", "q", "--answer-column", "a", "--demonstration-column", "d")


@pytest.fixture
def earlier(tmp_path):
    """Output of an earlier run; checked to be untouched at the end, with nothing half-written beside it."""
    out = tmp_path / "out" / "out.parquet"
    run(tmp_path, [jsonl(tmp_path / "earlier.jsonl", GOOD)], out)
    before = {file.name: file.read_bytes() for file in out.parent.iterdir()}
    assert set(before) == {"out.parquet", "out_card.md", "out_example.json"}
    yield out
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == before


def jsonl(path, *raw):
    path.write_text("".join(json.dumps(row) + "\n" for row in raw))
    return path


def parquet(path, *raw, **types):
    pq.write_table(pa.Table.from_pylist(list(raw)), path)
    return path


def run(tmp_path, files, out, *options, code=0):
    """The converter on files in the columns of `GOOD`; its error, unwrapped, if `code` is not 0."""
    pattern = str(files[0]) if len(files) == 1 else str(tmp_path / "shard*")
    result = CliRunner().invoke(app, ["convert", "--source", pattern, *COLUMNS, "--out", str(out), *options])
    assert result.exit_code == code, (result.output, result.stderr)
    return result.stderr


def refused(tmp_path, files, out, *says):
    message = run(tmp_path, files, out, code=1)
    for part in says:
        assert part in message, message
    assert "Traceback" not in message


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("column", ["q", "a", "d"])
def test_missing_column(tmp_path, earlier, write, column):
    rows = [{name: cell for name, cell in row.items() if name != column} for row in (GOOD, MORE)]
    file = write(tmp_path / f"x.{write.__name__}", *rows)
    there = ", ".join(repr(name) for name in "qad" if name != column)
    refused(tmp_path, [file], earlier, str(file), f"column {column!r}", "is missing", there, "--prompt-column")


def test_column_missing_from_one_row(tmp_path, earlier):
    file = jsonl(tmp_path / "x.jsonl", GOOD, {"q": "1+2=?", "d": []})
    refused(tmp_path, [file], earlier, f"{file}: row 1, column 'a' is missing", "Add it to the row")


@pytest.mark.parametrize(
    ("column", "cell", "says"),
    [
        ("q", 7, "row 1, column 'q' is int ('7'), not a"),
        ("q", [], "row 1, column 'q' is an empty list, not a list of messages"),
        ("q", [{"role": "user"}], "row 1, column 'q[0]' is dict"),
        ("q", [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "does not end in a user turn"),
        ("a", {"x": 1}, "row 1, column 'a' is dict, but a string in"),
        ("a", True, "row 1, column 'a' is bool, but a string in"),
        ("a", ["2"], "row 1, column 'a' is a list, but a string in"),
        ("d", 7, "row 1, column 'd' is int ('7'), not a string or a list"),
        ("d", ["x", 7], "row 1, column 'd[1]' is int ('7'), not a string"),
        ("d", [{"role": "user", "content": "x"}], "row 1, column 'd' ends in a turn of 'user'"),
        ("d", ["x", "\ud800"], "row 1, column 'd' holds half a surrogate pair"),
        ("a", float("nan"), "row 1, column 'a' is nan. Fill it in"),
        ("q", None, "row 1, column 'q' is null"),
        ("a", None, "row 1, column 'a' is null"),
        ("q", " ", "row 1, column 'q' is empty"),
        ("a", "", "row 1, column 'a' is empty"),
    ],
)
def test_wrong_cell(tmp_path, earlier, column, cell, says):
    file = jsonl(tmp_path / "x.jsonl", GOOD, {**MORE, column: cell})
    message = run(tmp_path, [file], earlier, code=1)
    assert f"{file}: " in message
    assert says in message


@pytest.mark.parametrize("column", ["q", "a"])
@pytest.mark.parametrize("cell", [None, "", float("nan")])
def test_unusable_rows_can_be_skipped(tmp_path, column, cell):
    file = jsonl(tmp_path / "x.jsonl", GOOD, {**MORE, column: cell})
    run(tmp_path, [file], tmp_path / "out.parquet", "--skip-bad")
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 1
    assert f"1 row: unusable cell in {column} (first: x.jsonl row 1)" in (tmp_path / "out_card.md").read_text()


@pytest.mark.parametrize("cell", [None, [], [None], [""]])
def test_rows_without_demonstration_are_plain_rows(tmp_path, cell):
    """Prefix-RFT gives them plain rollouts, so they are kept."""
    run(tmp_path, [jsonl(tmp_path / "x.jsonl", GOOD, {**MORE, "d": cell})], tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [len(row["demos"]) for row in found] == [1, 0]


def test_null_in_parquet(tmp_path, earlier):
    file = parquet(tmp_path / "x.parquet", GOOD, MORE, {**GOOD, "q": None})
    refused(tmp_path, [file], earlier, f"{file}: row 2, column 'q' is null", "--skip-bad")


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_mixed_types_across_shards(tmp_path, earlier, write):
    one = write(tmp_path / f"shard0.{write.__name__}", GOOD)
    two = write(tmp_path / f"shard1.{write.__name__}", {**MORE, "a": 2})
    refused(
        tmp_path, [one, two], earlier, f"{two}: row 0, column 'a' is a number, but a string in {one} row 0", "one type"
    )


def test_integers_and_floats_do_mix(tmp_path):
    jsonl(tmp_path / "shard0.jsonl", {**GOOD, "a": 2})
    jsonl(tmp_path / "shard1.jsonl", {**MORE, "a": 2.5})
    run(tmp_path, [1, 2], tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in found] == ["2", "2.5"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_not_utf8(tmp_path, earlier, suffix):
    file = tmp_path / f"x.{suffix}"
    lines = {
        "jsonl": ['{"q": "1+1=?", "a": "2", "d": ["x"]}', '{"q": "K\xf6ln?", "a": "2", "d": ["x"]}'],
        "json": ['[{"q": "1+1=?", "a": "2", "d": ["x"]},', '{"q": "K\xf6ln?", "a": "2", "d": ["x"]}]'],
        "csv": ["q,a,d", '"1+1=?\n",2,x', "K\xf6ln?,2,x"],
    }[suffix]
    file.write_bytes("\n".join(lines).encode("latin1"))
    refused(tmp_path, [file], earlier, f"{file}: row 1, column 'q' is not UTF-8", "iconv")


def test_not_utf8_in_parquet(tmp_path, earlier):
    wrong = pa.array([b"1+1=?", "K\xf6ln?".encode("latin1")]).cast(pa.binary()).view(pa.string())
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"q": wrong, "a": ["2", "2"], "d": [["x"], ["x"]]}), file)
    refused(tmp_path, [file], earlier, f"{file}: row 1, column 'q' is not UTF-8")


def test_no_demonstrations_at_all(tmp_path, earlier):
    file = jsonl(tmp_path / "x.jsonl", {**GOOD, "d": []}, {**MORE, "d": None})
    refused(
        tmp_path,
        [file],
        earlier,
        f"{file}: column 'd' none of the 2 rows has a usable demonstration",
        "--demonstration-column",
    )


def test_no_rows_at_all(tmp_path, earlier):
    file = tmp_path / "x.jsonl"
    file.write_text("")
    refused(tmp_path, [file], earlier, f"{file}: none of the 0 rows is left")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_parquet(tmp_path, earlier, keep):
    file = parquet(tmp_path / "x.parquet", *({**GOOD, "q": f"{i}?"} for i in range(500)))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    refused(tmp_path, [file], earlier, f"{file}: is not a readable parquet file", "Fetch or write it again")


def test_parquet_damaged_inside(tmp_path, earlier):
    file = tmp_path / "x.parquet"
    table = pa.Table.from_pylist([{**GOOD, "q": f"{i} {'x' * 300}?"} for i in range(500)])
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    whole = bytearray(file.read_bytes())
    whole[40:400] = bytes(360)
    file.write_bytes(whole)
    refused(tmp_path, [file], earlier, str(file), "row 0", "cannot be read on", "Fetch or write it again")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"q": "1+1=?", "a": "2", "d": []}\n{"q": "1+2', "row 1 is not JSON"),
        ('{"q": "1+1=?", "a": "2", "d": []}\n[1]\n', "row 1 is list, not an object"),
        ('{"q": "1+1=?", "a": "2", "d": []}\n' + "[" * 100_000, "row 1 is not JSON"),
    ],
)
def test_broken_json_lines(tmp_path, earlier, content, says):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    refused(tmp_path, [file], earlier, f"{file}: {says}")


def test_truncated_json(tmp_path, earlier):
    file = tmp_path / "x.json"
    file.write_text('[{"q": "1+1=?", "a": "2", "d": []}, {"q": "1+')
    refused(tmp_path, [file], earlier, f"{file}: is not JSON", "cut off")


def test_csv_with_a_field_too_many(tmp_path, earlier):
    file = tmp_path / "x.csv"
    file.write_text("q,a,d\n1+1=?,2,x\n1+2=?,3,x,y\n")
    refused(tmp_path, [file], earlier, f"{file}: row 1 has not the 3 fields", "Quote")


@pytest.mark.parametrize(
    "content",
    ['q,a,d\n1+1=?,2,x\n1+2=?,3,"cut off\n', "q,a,d\n1+1=?,2,x\n1+2=?,3,x\ry\n", 'q,a,d\n1+1=?,2,x\n1+2=?,3,"x"y\n'],
    ids=["a quote never closed", "a bare carriage return", "text behind a quote"],
)
def test_broken_csv(tmp_path, earlier, content):
    file = tmp_path / "x.csv"
    file.write_bytes(content.encode())
    refused(tmp_path, [file], earlier, f"{file}: row 1 is not CSV", "Quote")


def test_full_disk(tmp_path, earlier, monkeypatch):
    """/dev/full says ENOSPC at the first write, as a full disk does."""
    real = pq.ParquetWriter
    monkeypatch.setattr(pq, "ParquetWriter", lambda file, *args, **kwargs: real("/dev/full", *args, **kwargs))
    file = jsonl(tmp_path / "x.jsonl", *({**GOOD, "q": f"{i} {'x' * 1000}?"} for i in range(3000)))
    refused(tmp_path, [file], earlier, f"{earlier}: cannot be written (No space left on device)", "Free some space")


def test_a_file_larger_than_allowed(tmp_path, earlier):
    """RLIMIT_FSIZE, and what a FAT file system says: a real refusal in the middle of a row group."""
    file = jsonl(tmp_path / "x.jsonl", *({**GOOD, "q": f"{i} {os.urandom(500).hex()}?"} for i in range(1000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        refused(tmp_path, [file], earlier, f"{earlier}: cannot be written (File too large)", "another --out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("out", "code", "says"),
    [
        ("folder.parquet", 1, "folder.parquet: is a folder"),
        ("file/x.parquet", 1, "file: is no folder"),
        ("file/sub/x.parquet", 1, "sub: is no folder"),
        ("x.jsonl", 2, "NAME.parquet"),
        ("x", 2, "NAME.parquet"),
    ],
)
def test_an_output_that_cannot_be(tmp_path, earlier, out, code, says):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").write_text("")
    names = set(tmp_path.iterdir())
    file = jsonl(earlier.parent.parent / "good.jsonl", GOOD)
    message = run(tmp_path, [file], tmp_path / out, code=code)
    assert says in " ".join(message.split())
    assert "Traceback" not in message
    assert set(tmp_path.iterdir()) == names | {file}


@pytest.mark.parametrize("option", ["--limit", "--workers", "--max-tokens"])
def test_negative_counts_are_refused(tmp_path, earlier, option):
    file = jsonl(tmp_path / "x.jsonl", GOOD)
    assert option in run(tmp_path, [file], earlier, option, "-1", code=2)


def test_disk_full_when_the_card_is_written(tmp_path, earlier, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "write_card", full)
    refused(tmp_path, [jsonl(tmp_path / "x.jsonl", GOOD)], earlier, "No space left on device")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/file.parquet", "no/such/file.parquet: does not exist. Check the path."),
        ("no/such/*.parquet", "no/such/*.parquet: matches no file. Check the pattern."),
        (".", ".: is a folder. Name its files, for example ./*.parquet."),
    ],
)
def test_path_that_does_not_exist(tmp_path, earlier, source, says):
    result = CliRunner().invoke(app, ["convert", "--source", source, *COLUMNS, "--out", str(earlier)])
    assert (result.exit_code, result.stderr.strip()) == (1, says)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("opnr1-46k", "openr1-46k"),
        ("gms8k", "gsm8k"),
        ("OpenR1-Math-220K", "openr1-220k"),
        ("numina", "numinamath-cot"),
        ("MATH-500", "math500"),
        ("GAIR/LIMO-2", "limo"),
    ],
)
def test_name_that_is_no_source(tmp_path, earlier, name, near):
    result = CliRunner().invoke(app, ["convert", "--source", name, "--out", str(earlier)])
    assert result.exit_code == 1
    assert f"{name}: is no source. Did you mean" in result.stderr
    assert near in result.stderr
    assert "verl-prefix data list" in result.stderr


def test_nothing_is_near_a_strange_name():
    assert sources.near("zzzzqqqq") == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "uft"], "Add --from FILES"),
        (["--source", "gsm8k", "--answer-column", "a"], "brings its own columns"),
        (["--source", "x.parquet"], "Add --prompt-column and --answer-column"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, earlier, arguments, says):
    result = CliRunner().invoke(app, ["convert", *arguments, "--out", str(earlier)])
    assert result.exit_code == 1
    assert says in result.stderr


def test_hub_out_of_reach(tmp_path, earlier, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    result = CliRunner().invoke(app, ["convert", "--source", "gpqa-diamond", "--out", str(earlier)])
    assert result.exit_code == 1
    for part in ("Idavidrein/gpqa: cannot be loaded (ConnectionError", "hf download", "--from FILES", "hf auth login"):
        assert part in result.stderr


def test_flags_of_another_length(tmp_path):
    source = sources.Source("own", None, "", Question("q"), Answer("a"), Demos(("d",), correct="c"))
    file = jsonl(tmp_path / "x.jsonl", {**GOOD, "c": [True, False]})
    with pytest.raises(DataError, match="row 0, column 'c' has 2 flags for 1 demonstrations"):
        conversion.convert(source, [reading.open_file(file)], tmp_path / "o.parquet", conversion.Options())


def test_an_error_in_the_grader_leaves_nothing(tmp_path):
    def broken(pairs):
        raise RuntimeError("grader")

    source = sources.Source("own", None, "", Question("q"), Answer("a"), Demos(("d",)))
    shard = reading.open_file(jsonl(tmp_path / "x.jsonl", GOOD))
    with pytest.raises(RuntimeError, match="grader"):
        conversion.convert(source, [shard], tmp_path / "o.parquet", conversion.Options(), grade=broken)
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_other_commands_refuse_what_is_not_theirs(tmp_path):
    out = tmp_path / "out.parquet"
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    plain = parquet(tmp_path / "plain.parquet", GOOD)
    cases = [
        (["sft", broken, "--out", out], "is not a readable parquet file"),
        (["sft", plain, "--out", out], "column 'prompt' is missing"),
        (["sft", tmp_path / "no.parquet", "--out", out], "does not exist"),
        (["decontaminate", plain, "--against", plain], "column 'prompt' is missing"),
        (["decontaminate", plain, "--against", tmp_path / "no.parquet"], "does not exist"),
    ]
    for arguments, says in cases:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 1
        assert says in result.stderr
    assert not out.exists()


def test_errors_can_be_carried_to_another_process():
    error = DataError("x.parquet", "is null", "Fill it in.", 3, "q")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "x.parquet: row 3, column 'q' is null. Fill it in."


def test_replacing_several_files_or_none(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("old")

    def write_and_fail():
        with writing.replacing(one, two) as parts:
            for part in parts:
                part.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert [file.name for file in tmp_path.iterdir()] == ["one"]
    assert one.read_text() == "old"


def test_index_of_nothing(tmp_path):
    assert decontaminate.build_index([], 13).find("What is 1+1?") is None
