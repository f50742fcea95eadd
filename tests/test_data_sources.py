r"""Every source and evaluation set on a small file with exactly its columns and nesting, and what must come out."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_prep import rows, sources
from data_prep.cli import app

TEXT, FLAGS, TEXTS = pa.string(), pa.list_(pa.bool_()), pa.list_(pa.string())
TURNS = pa.list_(pa.struct([("content", TEXT), ("role", TEXT)]))
REWARD = pa.struct([("ground_truth", TEXT), ("style", TEXT)])
INFO = pa.struct([("index", pa.int64()), ("split", TEXT)])

BOX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = "\n\nPlease reason step by step, and put the letter of the right option within \\boxed{}."
R1 = "<think>\n1 and 1 make 2.\n</think>\n\nIt is \\boxed{2}."
R1_UNOPENED = "1 and 1 make 2.\n</think>\n\nIt is \\boxed{2}."
SYSTEM = {"content": "Think first.", "role": "system"}
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n1+1=?\n\nRemember to put your answer on "
    'its own line after "Answer:".'
)


def user(content):
    return {"content": content, "role": "user"}


def verl_row(**columns):
    return {
        "data_source": "there",
        "prompt": [user("1+1=?")],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 5, "split": "default"},
        **columns,
    }


VERL = [("data_source", TEXT), ("prompt", TURNS), ("ability", TEXT), ("reward_model", REWARD), ("extra_info", INFO)]

#: name -> (schema as on the hub, one row, question, answer, demonstrations)
TRAINING = {
    "openr1-46k": (
        [*VERL[:2], ("target", TURNS), *VERL[2:]],
        verl_row(prompt=[SYSTEM, user("1+1=?")], target=[{"content": R1, "role": "assistant"}]),
        ([{"role": "system", "content": "Think first."}, {"role": "user", "content": "1+1=?"}], "2", [R1]),
    ),
    "openr1-220k": (
        [
            *((name, TEXT) for name in ("problem", "solution", "answer", "problem_type", "question_type", "source")),
            ("uuid", TEXT),
            ("is_reasoning_complete", FLAGS),
            ("generations", TEXTS),
            ("correctness_math_verify", FLAGS),
            ("correctness_llama", FLAGS),
            ("finish_reasons", TEXTS),
            ("correctness_count", pa.int64()),
            ("messages", TURNS),
        ],
        {
            "problem": "1+1=?",
            "solution": "Reference.",
            "answer": "2",
            "is_reasoning_complete": [True, True, False, True],
            "generations": [R1, "wrong", "cut off", R1_UNOPENED],
            "correctness_math_verify": [True, False, True, False],
            "correctness_llama": [None, False, True, True],
            "finish_reasons": None,
        },
        ("1+1=?" + BOX, "2", [R1, R1]),
    ),
    "deepmath-103k": (
        [
            ("question", TEXT),
            ("final_answer", TEXT),
            ("difficulty", pa.float64()),
            ("topic", TEXT),
            *((f"r1_solution_{i}", TEXT) for i in (1, 2, 3)),
        ],
        {
            "question": "1+1=?",
            "final_answer": "2",
            "difficulty": 4.5,
            "topic": "Algebra",
            "r1_solution_1": R1_UNOPENED,
            "r1_solution_2": R1,
            "r1_solution_3": "It is \\boxed{2}.",
        },
        ("1+1=?" + BOX, "2", [R1, R1, "It is \\boxed{2}."]),
    ),
    "s1k-1.1": (
        [
            (name, TEXT)
            for name in [
                "solution",
                "question",
                "cot_type",
                "source_type",
                "metadata",
                "gemini_thinking_trajectory",
                "gemini_attempt",
                "deepseek_thinking_trajectory",
                "deepseek_attempt",
                "gemini_grade",
                "gemini_grade_reason",
                "deepseek_grade",
                "deepseek_grade_reason",
            ]
        ],
        {
            "solution": "First \\boxed{1}, then \\boxed{2}.",
            "question": "1+1=?",
            "deepseek_thinking_trajectory": "1 and 1 make 2.",
            "deepseek_attempt": "It is \\boxed{2}.",
            "gemini_thinking_trajectory": "Hm.",
            "gemini_attempt": "\\boxed{2}",
        },
        ("1+1=?" + BOX, "2", [R1]),
    ),
    "openthoughts-math": (
        [
            ("source", TEXT),
            ("problem", TEXT),
            ("solution", TEXT),
            ("messages", TURNS),
            ("system", TEXT),
            ("conversations", pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))),
            ("generated_token_count", pa.int64()),
            ("correct", pa.bool_()),
        ],
        {
            "source": "amc",
            "problem": "1+1=?",
            "solution": "It is \\boxed{2}",
            "messages": [user("1+1=?"), {"content": "It is 3", "role": "assistant"}],
            "conversations": [
                {"from": "user", "value": "Return your final response within \\boxed{}. 1+1=?"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>\n\n1 and 1 make 2.\n\n<|end_of_thought|>\n\n"
                    "<|begin_of_solution|>\n\nIt is \\boxed{2}.\n\n<|end_of_solution|>",
                },
            ],
            "generated_token_count": 12,
            "correct": True,
        },
        ("1+1=?" + BOX, "2", [R1]),
    ),
    "limo": (
        [("question", TEXT), ("solution", TEXT), ("answer", TEXT)],
        {"question": "1+1=?", "solution": "It is \\boxed{2}", "answer": "2"},
        ("1+1=?" + BOX, "2", ["It is \\boxed{2}"]),
    ),
    "gsm8k": (
        [("question", TEXT), ("answer", TEXT)],
        {"question": "1+1=?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"},
        ("1+1=?" + BOX, "1,002", ["1+1=<<1+1=2>>2\nThe answer is \\boxed{1,002}."]),
    ),
    "math": (
        [("problem", TEXT), ("level", TEXT), ("type", TEXT), ("solution", TEXT)],
        {
            "problem": "1+1=?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": "It is $\\boxed{\\frac{4}{\\sqrt{4}}}$.",
        },
        ("1+1=?" + BOX, "\\frac{4}{\\sqrt{4}}", ["It is $\\boxed{\\frac{4}{\\sqrt{4}}}$."]),
    ),
    "numinamath-cot": (
        [("source", TEXT), ("problem", TEXT), ("solution", TEXT), ("messages", TURNS)],
        {"source": "amc", "problem": "1+1=?", "solution": "It is \\boxed{2}", "messages": [user("1+1=?")]},
        ("1+1=?" + BOX, "2", ["It is \\boxed{2}"]),
    ),
    "dapo-17k": (
        [*VERL[:4], ("extra_info", pa.struct([("index", TEXT)]))],
        verl_row(prompt=[user(DAPO)], extra_info={"index": "9a9b6eb4"}),
        ("1+1=?" + BOX, "2", []),
    ),
    "skywork-or1": (
        [
            *VERL[:4],
            (
                "extra_info",
                pa.struct([("index", pa.int64()), ("model_difficulty", pa.struct([("Distill-7B", pa.int64())]))]),
            ),
        ],
        verl_row(
            reward_model={"ground_truth": '["\\\\frac{1}{2}"]', "style": "rule"},
            extra_info={"index": 3, "model_difficulty": {"Distill-7B": 4}},
        ),
        ([user("1+1=?")], "\\frac{1}{2}", []),
    ),
    "prefix-rft": (
        [*VERL, ("demos", TEXTS), ("demos_corr", FLAGS)],
        verl_row(demos=[R1, "It is \\boxed{3}"], demos_corr=[True, False]),
        ([user("1+1=?")], "2", [R1, "It is \\boxed{3}"]),
    ),
    "luffy": (
        [*VERL, ("target", TURNS)],
        verl_row(target=[{"content": R1, "role": "assistant"}]),
        ([user("1+1=?")], "2", [R1]),
    ),
    "uft": (
        [*VERL, ("hint", TEXTS)],
        verl_row(hint=["1 and 1.\n", "It is \\boxed{2}"]),
        ([user("1+1=?")], "2", ["1 and 1.\nIt is \\boxed{2}"]),
    ),
}
TRAINING["s1k-1.1-gemini"] = (
    *TRAINING["s1k-1.1"][:2],
    ("1+1=?" + BOX, "2", ["<think>\nHm.\n</think>\n\n\\boxed{2}"]),
)

#: name -> (schema as on the hub, one row, prompt, answer)
EVALUATION = {
    "aime24": (
        [("id", pa.int64()), *((name, TEXT) for name in ("problem", "solution", "answer", "url", "year"))],
        {"id": 60, "problem": "1+1=?", "solution": "...", "answer": "\\boxed{204}", "url": "u", "year": "2024"},
        "1+1=?" + BOX,
        "204",
    ),
    "aime25": (
        [("problem", TEXT), ("answer", TEXT), ("id", TEXT)],
        {"problem": "1+1=?", "answer": "070", "id": "0"},
        "1+1=?" + BOX,
        "070",
    ),
    "amc23": (
        [("id", pa.int64()), ("question", TEXT), ("answer", pa.float64()), ("url", TEXT)],
        {"id": 0, "question": "1+1=?", "answer": 27.0, "url": "u"},
        "1+1=?" + BOX,
        "27.0",
    ),
    "math500": (
        [(name, TEXT) for name in ("problem", "solution", "answer", "subject")]
        + [("level", pa.int64()), ("unique_id", TEXT)],
        {"problem": "1+1=?", "solution": "s", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "level": 2},
        "1+1=?" + BOX,
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    ),
    "minerva": (
        [("problem", TEXT), ("solution", TEXT), ("type", TEXT), ("idx", pa.int64())],
        {"problem": "1+1=?", "solution": "So $\\boxed{4.5e33}$ erg/s.", "type": "Astronomy", "idx": 0},
        "1+1=?" + BOX,
        "4.5e33",
    ),
    "olympiadbench": (
        [("id", pa.int64()), ("question", TEXT), ("solution", TEXTS), ("final_answer", TEXTS), ("context", TEXT)]
        + [(f"image_{i}", TEXT) for i in range(1, 10)]
        + [("modality", TEXT), ("difficulty", TEXT), ("is_multiple_answer", pa.bool_())]
        + [
            (name, TEXT)
            for name in ["unit", "answer_type", "error", "question_type", "subfield", "subject", "language"]
        ],
        {"id": 1, "question": "1+1=?", "solution": ["s"], "final_answer": ["$2$", "$\\frac{1}{2}$"]},
        "1+1=?" + BOX,
        "2, \\frac{1}{2}",
    ),
    "arc-challenge": (
        [("id", TEXT), ("question", TEXT), ("choices", pa.struct([("text", TEXTS), ("label", TEXTS)]))]
        + [("answerKey", TEXT)],
        {"id": "a", "question": "1+1=?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"},
        "1+1=?\n\nA. one\nB. two" + LETTER,
        "B",
    ),
    "gpqa-diamond": (
        [(name, TEXT) for name in ("Record ID", "Question", "Correct Answer", "Explanation", "Subdomain")]
        + [(f"Incorrect Answer {i}", TEXT) for i in (1, 2, 3)],
        {"Question": "1+1=?", "Correct Answer": "two\n", **{f"Incorrect Answer {i}": str(i + 2) for i in (1, 2, 3)}},
        None,
        None,
    ),
    "mmlu-pro": (
        [("question_id", pa.int64()), ("question", TEXT), ("options", TEXTS), ("answer", TEXT)]
        + [("answer_index", pa.int64()), ("cot_content", TEXT), ("category", TEXT), ("src", TEXT)],
        {"question": "1+1=?", "options": [str(i) for i in range(10)], "answer": "C", "answer_index": 2},
        "1+1=?\n\n" + "\n".join(f"{letter}. {i}" for i, letter in enumerate("ABCDEFGHIJ")) + LETTER,
        "C",
    ),
}
ALL = {**TRAINING, **EVALUATION}


def write(path, schema, *raw):
    pq.write_table(pa.Table.from_pylist(list(raw), schema=pa.schema(schema)), path)
    return path


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def convert(tmp_path, name, *raw, schema=None, options=()):
    file = write(tmp_path / f"{name}.source.parquet", schema or ALL[name][0], *(raw or [ALL[name][1]]))
    run("convert", "--source", name, "--from", file, "--out", tmp_path / f"{name}.parquet", *options)
    return pq.read_table(tmp_path / f"{name}.parquet")


def test_every_source_is_covered_here():
    assert set(ALL) == set(sources.SOURCES)


@pytest.mark.parametrize("name", TRAINING)
def test_training_source(tmp_path, name):
    _, _, (prompt, answer, demos) = TRAINING[name]
    (row,) = convert(tmp_path, name).to_pylist()
    assert row["prompt"] == ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    assert row["reward_model"] == {"ground_truth": answer, "style": "rule"}
    assert row["demos"] == demos
    assert row["data_source"] == ("there" if "data_source" in dict(TRAINING[name][0]) else name)
    assert row["extra_info"] == {
        "index": rows.first_index(name, "1+1=?"),
        "split": "train",
        "row": 0,
        "question": "1+1=?",
    }
    assert row["demos_tokens"] == []
    assert len(row["demos_steps"]) == len(demos)


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_set(tmp_path, name):
    table = convert(tmp_path, name)
    assert table.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    (row,) = table.to_pylist()
    _, _, prompt, answer = EVALUATION[name]
    if prompt is not None:  # the options of GPQA come in a drawn order
        assert row["prompt"] == [{"role": "user", "content": prompt}]
        assert row["reward_model"]["ground_truth"] == answer
    assert row["extra_info"]["split"] == "test"
    assert row["data_source"] == name


@pytest.mark.parametrize("name", ALL)
def test_schema_is_the_same_for_all(tmp_path, name):
    evaluation = name in EVALUATION
    table = convert(tmp_path, name)
    assert table.schema.equals(rows.features(evaluation=evaluation).arrow_schema, check_metadata=False)
    assert datasets.Features.from_arrow_schema(table.schema) == rows.features(evaluation=evaluation)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_files_of_all_sources_concatenate(tmp_path, kind):
    names = list(TRAINING if kind == "training" else EVALUATION)
    for name in names:
        convert(tmp_path, name)
    files = [str(tmp_path / f"{name}.parquet") for name in names]
    together = datasets.load_dataset("parquet", data_files=files, cache_dir=tmp_path / "cache")["train"]
    assert len(together) == len(names)
    assert together.features == rows.features(evaluation=kind == "evaluation")
    assert len({row["extra_info"]["index"] for row in together}) == len(names)


def test_flags_of_openr1_decide_and_are_kept(tmp_path):
    (row,) = convert(tmp_path, "openr1-220k").to_pylist()
    assert row["demos_correct"] == [True, True]
    assert row["solution"] == "Reference."
    card = (tmp_path / "openr1-220k_card.md").read_text()
    assert "2 demonstrations: the source's own flags do not hold" in card
    assert "Apache-2.0" in card


def test_flags_of_the_authors_mark_or_drop(tmp_path):
    (row,) = convert(tmp_path, "prefix-rft").to_pylist()
    assert row["demos_correct"] == [True, False]


def test_wrong_ones_of_openthoughts_are_not_taken(tmp_path):
    schema, right, _ = TRAINING["openthoughts-math"]
    wrong = {**right, "problem": "2+2=?", "correct": False}
    unknown = {**right, "problem": "3+3=?", "correct": None}
    table = convert(tmp_path, "openthoughts-math", right, wrong, unknown)
    assert [len(row["demos"]) for row in table.to_pylist()] == [1, 0, 0]


def test_steps_of_uft_survive(tmp_path):
    (row,) = convert(tmp_path, "uft").to_pylist()
    (demo,), (ends,) = row["demos"], row["demos_steps"]
    starts = [0, *ends[:-1]]
    assert [demo[a:b] for a, b in zip(starts, ends, strict=True)] == ["1 and 1.\n", "It is \\boxed{2}"]


def test_proofs_without_an_answer_are_dropped(tmp_path):
    _, good, _ = TRAINING["numinamath-cot"]
    table = convert(tmp_path, "numinamath-cot", good, {**good, "problem": "Prove it.", "solution": "Clear."})
    assert table.num_rows == 1
    assert "1 row: no answer" in (tmp_path / "numinamath-cot_card.md").read_text()


def test_s1k_solution_without_a_box(tmp_path):
    _, row, _ = TRAINING["s1k-1.1"]
    table = convert(
        tmp_path, "s1k-1.1", {**row, "solution": "128"}, {**row, "question": "Why?", "solution": "A proof.\n" * 9}
    )
    assert [row["reward_model"]["ground_truth"] for row in table.to_pylist()] == ["128"]


@pytest.mark.parametrize("column", ["answer", "solution"])
def test_both_forms_of_minerva(tmp_path, column):
    schema = [("question", TEXT), (column, TEXT)]
    cell = {"answer": "4.5e33", "solution": "First \\boxed{1}, so \\boxed{4.5e33}."}[column]
    (row,) = convert(tmp_path, "minerva", {"question": "1+1=?", column: cell}, schema=schema).to_pylist()
    assert row["reward_model"]["ground_truth"] == "4.5e33"


def test_gpqa_options_are_shuffled_by_seed(tmp_path):
    schema, row, _, _ = EVALUATION["gpqa-diamond"]
    many = [{**row, "Question": f"{i}+1=?"} for i in range(40)]
    letters = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(letters))
        folder.mkdir()
        found = convert(folder, "gpqa-diamond", *many, options=("--seed", seed)).to_pylist()
        letters.append([row["reward_model"]["ground_truth"] for row in found])
        for row in found:
            letter = row["reward_model"]["ground_truth"]
            assert f"\n{letter}. two\n" in row["prompt"][0]["content"] + "\n"
    assert letters[0] == letters[1] != letters[2]
    assert set(letters[0]) == set("ABCD")


def test_evaluation_sets_keep_repeated_questions(tmp_path):
    row = EVALUATION["aime25"][1]
    assert convert(tmp_path, "aime25", row, row).num_rows == 2


@pytest.mark.parametrize("name", ["gsm8k", "openr1-46k", "openr1-220k", "arc-challenge"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_files_give_the_same(tmp_path, name, suffix):
    from_parquet = convert(tmp_path, name).to_pylist()
    row = {column: ALL[name][1].get(column) for column, _ in ALL[name][0]}
    file = tmp_path / f"again.{suffix}"
    file.write_text(json.dumps([row]) if suffix == "json" else json.dumps(row) + "\n\n")
    run("convert", "--source", name, "--from", file, "--out", tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet").to_pylist() == from_parquet


@pytest.mark.parametrize("name", [name for name, source in sources.SOURCES.items() if source.hub])
def test_hub_ids_go_through_datasets(tmp_path, monkeypatch, name):
    """`load_dataset` itself runs: a folder of the hub id's name is to it what the repository on the hub is."""
    source = sources.SOURCES[name]
    repository = tmp_path / source.hub
    repository.mkdir(parents=True)
    write(repository / "x.parquet", ALL[name][0], ALL[name][1])
    config = {
        "config_name": source.config or "default",
        "data_files": [{"split": source.split, "path": "x.parquet"}],
    }
    (repository / "README.md").write_text(f"---\nconfigs:\n- {json.dumps(config)}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run("convert", "--source", source.hub if not name.endswith("gemini") else name, "--out", "out.parquet")
    streamed = pq.read_table("out.parquet")
    assert streamed.equals(convert(tmp_path, name))


def test_numbers_of_sources_differ():
    starts = {rows.first_index(name, "1+1=?") for name in sources.SOURCES}
    assert len(starts) == len(sources.SOURCES)
    assert max(starts) + 10**9 < 2**53
