"""`verl-prefix eval` against a small OpenAI-compatible server: prompts, counts, failures, resuming, verl's dumps."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_vllm import FakeVLLM
from transformers import Qwen2Config
from typer.testing import CliRunner

from data_prep.testbed import task
from data_prep.testbed.tokenizer import build_tokenizer
from verl_prefix import cli
from verl_prefix.evaluation import checkpoints, client, problems, server, store, validation
from verl_prefix.exceptions import EvaluationError, PrefixConfigError

TOKENIZER = build_tokenizer()
TESTS = Path(__file__).parent
ROOT = TESTS.parent


def prompt(text):
    return [{"role": "user", "content": text}]


def rows_of(name, count):
    """Problems whose answer is the number in their prompt."""
    return [
        {
            "data_source": name,
            "prompt": prompt(f"{name} {i}="),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"split": "test", "index": i},
        }
        for i in range(count)
    ]


@pytest.fixture
def write(tmp_path):
    """write(rows, name) -> path of a parquet file."""

    def file(rows, name="set.parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return tmp_path / name

    return file


@pytest.fixture
def model(tmp_path):
    """A Hugging Face folder with a tokenizer and bytes for weights."""
    folder = tmp_path / "model"
    TOKENIZER.save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def question(body):
    """(data set, number) of the prompt of a request."""
    name, number = re.fullmatch(r"(\w+) (\d+)=<\|im_start\|>", TOKENIZER.decode(body["prompt"])).groups()
    return name, int(number)


def right(body):
    return rf"so \boxed{{{question(body)[1]}}}"


@pytest.fixture
def fake(monkeypatch):
    """fake(reply=right, ...) -> a server that answers correctly."""
    monkeypatch.setattr(client, "RETRIES", 1)
    there = []

    def start(reply=right, tokenize=encode, **more):
        there.append(FakeVLLM(reply, tokenize, **more))
        return there[-1]

    yield start
    for each in there:
        each.__exit__()


def run(*arguments, limits=("--max-tokens", "32", "--grader", "data_prep/testbed/grader.py")):
    return CliRunner().invoke(cli.app, ["eval", *map(str, limits), *map(str, arguments)], env={"COLUMNS": "120"})


def lines(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def sets(out):
    return json.loads((out / "summary.json").read_text())["sets"]


# ---- what is sent, what is counted ----


def test_samples_are_drawn_graded_counted_and_shown(write, model, fake, tmp_path):
    there = fake(lambda body: right(body) if question(body) != ("b", 1) and body["seed"] % 2 else r"\boxed{no}")
    files = [write(rows_of("a", 3), "a.parquet"), write(rows_of("b", 2), "b.parquet")]
    out = tmp_path / "out"
    done = run(*files, "--model", model, "--server", there.url, "--out", out, "-n", 2, "--n-of", "b=4", "--top-p", 0.9)
    assert done.exit_code == 0, done.output
    assert Counter(question(body) for body in there.requests) == {
        **{("a", i): 2 for i in range(3)},
        **{("b", i): 4 for i in range(2)},
    }
    assert len({body["seed"] for body in there.requests}) == len(there.requests) == 14
    for body in there.requests:
        sent = {key: body[key] for key in body if key not in ("prompt", "seed")}
        assert sent == {
            "model": "model",
            "temperature": 0.6,
            "top_p": 0.9,
            "max_tokens": 32,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    counts = Counter((question(b)) for b in there.requests if b["seed"] % 2 and question(b) != ("b", 1))
    found = sets(out)
    assert found["a"]["avg"]["value"] == pytest.approx(sum(counts["a", i] for i in range(3)) / 6)
    assert found["b"]["avg"]["value"] == pytest.approx(counts["b", 0] / 8)
    assert found["b"]["pass@4"]["value"] == (0.5 if counts["b", 0] else 0)
    assert list(found["a"]) == [
        "problems", "n", "not_graded", "avg", "pass@1", "pass@2", "cut_share", "response_tokens",
    ]  # fmt: skip
    assert re.search(r"a\s+3 x 2\s+\d+\.\d \[", done.output)
    assert re.search(r"mean of 2 \(math\)", done.output)
    record = next(r for r in lines(out) if r["problem"] == "a.parquet:2" and r["correct"])
    assert record["response"] == r"so \boxed{2}"
    assert record["ground_truth"] == "2"
    assert record["grade"] == {"score": 1.0, "acc": 1.0}


def test_prompts_are_the_tokens_of_training(write, tmp_path):
    from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder

    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "two  words,\n\n'tis 10 + 1\t= A? é"}]
    rows = [{**rows_of("a", 1)[0], "prompt": chat}]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% if think %}<think>{% endif %}{% endif %}"
    )
    for keywords in ({}, {"think": True}):
        builder = ContinuousTokenBuilder(tokenizer, chat_template_kwargs=keywords)
        (found,) = problems.read([write(rows)], tokenizer, template=keywords)
        assert found.prompt_ids == builder.build_initial_tokens(chat)
    assert tokenizer.decode(found.prompt_ids).endswith("<think>")


def test_template_options_reach_the_prompt(write, model, fake, tmp_path):
    there = fake(lambda body: r"\boxed{0}")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}{{ '!' if loud else '?' }}")
    file = write(rows_of("a", 1))
    options = ("--model", model, "--server", there.url, "--chat-template", template, "--template-arg", "loud=true")
    assert run(file, *options, "--out", tmp_path / "out").exit_code == 0
    assert TOKENIZER.decode(there.requests[0]["prompt"]) == "a 0=!"


def test_seeds_do_not_depend_on_order_or_other_problems():
    seeds = [client.sample_seed(0, f"f:{p}", s) for p in range(50) for s in range(20)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert client.sample_seed(0, "f:1", 2) == client.sample_seed(0, "f:1", 2) != client.sample_seed(1, "f:1", 2)


def test_the_graders_keywords_and_name_are_given_as_to_verl(write, model, fake, tmp_path):
    grader = tmp_path / "mine.py"
    grader.write_text(
        "async def judge(data_source, solution_str, ground_truth, extra_info, strict=False):\n"
        "    return float(strict and (data_source, ground_truth, extra_info['index']) == ('a', '0', 0))\n"
    )
    there = fake()
    file = write(rows_of("a", 1))
    common = ("--model", model, "--server", there.url)
    limits = ("--max-tokens", 32, "--grader", f"{grader}:judge")
    assert run(file, *common, "--out", tmp_path / "0", limits=limits).exit_code == 0
    assert run(file, *common, "--out", tmp_path / "1", "--grader-arg", "strict=true", limits=limits).exit_code == 0
    assert [sets(tmp_path / i)["a"]["avg"]["value"] for i in "01"] == [0, 1]


def test_the_projects_own_grader_is_the_default(write, model, fake, tmp_path):
    there = fake(lambda body: r"\boxed{\frac{2}{4}}" if question(body)[1] else r"\boxed{17}")
    rows = [{**row, "reward_model": {"ground_truth": "0.5"}} for row in rows_of("a", 2)]
    options = ("--model", model, "--server", there.url, "--out", tmp_path / "out")
    assert run(write(rows), *options, limits=("--max-tokens", 32)).exit_code == 0
    assert sets(tmp_path / "out")["a"]["avg"]["value"] == 0.5


# ---- failures ----


def test_a_failed_request_is_reported_and_never_counted_as_wrong(write, model, fake, tmp_path):
    there = fake(lambda body: 400 if question(body)[1] == 1 else right(body))
    options = (write(rows_of("a", 3)), "--model", model, "--server", there.url, "--out", tmp_path / "out")
    done = run(*options)
    assert done.exit_code == 1
    assert "1 samples have no grade" in done.output
    assert "set.parquet:1: BadRequestError" in done.output
    assert sets(tmp_path / "out")["a"]["avg"]["value"] == 1.0
    assert sets(tmp_path / "out")["a"]["not_graded"] == 1
    failed = [record for record in lines(tmp_path / "out") if "error" in record]
    assert [(record["problem"], "correct" in record) for record in failed] == [("set.parquet:1", False)]

    there.reply = right
    there.requests.clear()
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert [question(body) for body in there.requests] == [("a", 1)], "only what failed is asked for again"
    assert sets(tmp_path / "out")["a"]["not_graded"] == 0


def test_overload_is_waited_out(write, model, fake, tmp_path):
    refused = set()

    def once_busy(body):
        if body["seed"] not in refused:
            refused.add(body["seed"])
            return 503
        return right(body)

    there = fake(once_busy)
    done = run(write(rows_of("a", 3)), "--model", model, "--server", there.url, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert len(there.requests) == 6


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(500, "InternalServerError"), ((r"\boxed{0}", "abort"), "the server ended the response: abort")],
)
def test_what_the_server_could_not_finish_is_no_answer(write, model, fake, tmp_path, reply, reason):
    there = fake(lambda body: reply)
    done = run(write(rows_of("a", 1)), "--model", model, "--server", there.url, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert reason in done.output
    assert "avg" not in sets(tmp_path / "out")["a"]


def test_a_response_that_takes_too_long_is_no_answer(write, model, fake, tmp_path):
    def slow(body):
        time.sleep(3 if question(body)[1] else 0)
        return right(body)

    there = fake(slow)
    options = ("--model", model, "--server", there.url, "--out", tmp_path / "out", "--timeout", 1)
    done = run(write(rows_of("a", 2)), *options)
    assert done.exit_code == 1
    assert "no response within 1 s, 2 times" in done.output
    assert sets(tmp_path / "out")["a"]["avg"]["value"] == 1.0


@pytest.mark.parametrize("status", [401, 404, None])
def test_a_server_that_is_gone_or_refuses_everybody_ends_it(write, model, fake, tmp_path, status):
    there = fake()

    def reply(body):
        return right(body) if len(there.requests) <= 4 else status

    there.reply = reply
    options = (write(rows_of("a", 40)), "--model", model, "--server", there.url, "--out", tmp_path / "out")
    done = run(*options, "--concurrency", 1)
    assert done.exit_code == 1
    assert "Finished samples are kept" in done.output
    assert len(lines(tmp_path / "out")) == 4
    assert len(there.requests) < 10
    assert not (tmp_path / "out/summary.json").exists()


def test_a_grader_that_raises_is_reported_and_never_counted_as_wrong(write, model, fake, tmp_path):
    grader = tmp_path / "mine.py"
    grader.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': -1.0, 'acc': 1 // int(ground_truth)}\n"
    )
    there = fake()
    options = ("--model", model, "--server", there.url, "--out", tmp_path / "out", "--grader", grader)
    done = run(write(rows_of("a", 2)), *options)
    assert done.exit_code == 1
    assert "the grader raised ZeroDivisionError" in done.output
    assert sets(tmp_path / "out")["a"]["avg"]["value"] == 1.0, "acc counts, not score"


@pytest.mark.parametrize("result", ["0.5", "{'score': -1}", "{'acc': 0.3, 'score': 1}", "{'points': 1}"])
def test_grades_that_are_not_right_or_wrong_are_refused(write, model, fake, tmp_path, result):
    grader = tmp_path / "mine.py"
    grader.write_text(f"def compute_score(**row):\n    return {result}\n")
    there = fake()
    options = ("--model", model, "--server", there.url, "--out", tmp_path / "out", "--grader", grader)
    done = run(write(rows_of("a", 1)), *options)
    assert done.exit_code == 1
    assert "Let the grader return `acc`" in done.output
    assert lines(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 37}, "make 38; the server has room for 37"),
        ({"tokenize": lambda text: [1, 2]}, r"tokenises set.parquet:10 as [1, 2]"),
        ({"models": ("x", "y")}, "serves x, y; choose with --served-name"),
        ({"models": ()}, "serves no model"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_anything_is_drawn(write, model, fake, tmp_path, change, message):
    there = fake(**change)
    done = run(write(rows_of("a", 11)), "--model", model, "--server", there.url, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert message in done.output.replace("\n", "")
    assert there.requests == []


def test_one_of_several_models_can_be_named(write, model, fake, tmp_path):
    there = fake(models=("x", "y"))
    options = ("--model", model, "--server", f"{there.url}/v1/", "--out", tmp_path / "out")
    assert run(write(rows_of("a", 1)), *options, "--served-name", "y").exit_code == 0
    assert there.requests[0]["model"] == "y"
    with pytest.raises(EvaluationError, match="--served-name z: .* serves x, y"):
        server.find(there.url, "z")


def test_a_server_without_tokenize_is_used_with_a_warning(write, model, fake, tmp_path):
    there = fake(tokenize=None)
    done = run(write(rows_of("a", 1)), "--model", model, "--server", there.url, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert "warning" in done.output
    assert "has no /tokenize" in done.output


def test_no_server_there(write, model, tmp_path):
    done = run(write(rows_of("a", 1)), "--model", model, "--server", "http://127.0.0.1:9", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "--server http://127.0.0.1:9: no list of models there" in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "row 1 has no reward_model.ground_truth"),
        ({"data_source": None}, "row 1, data_source is None"),
        ({"prompt": None}, "row 1: the chat template cannot render its prompt"),
    ],
)
def test_a_row_that_cannot_be_evaluated_is_named(write, change, message):
    first, second = rows_of("a", 2)
    with pytest.raises(EvaluationError, match=f"set.parquet: {message}"):
        problems.read([write([first, {**second, **change}])], TOKENIZER)


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    with pytest.raises(EvaluationError, match=r"has no column reward_model, only .* data convert"):
        problems.read([write([{"prompt": prompt("x"), "data_source": "a"}])], TOKENIZER)
    (tmp_path / "text.parquet").write_text("no parquet")
    for name in ("text.parquet", "missing.parquet"):
        with pytest.raises(EvaluationError, match=f"{name}: is not a readable parquet file"):
            problems.read([tmp_path / name], TOKENIZER)
    pq.write_table(pq.read_table(write(rows_of("a", 1))).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(EvaluationError, match="has no rows"):
        problems.read([tmp_path / "empty.parquet"], TOKENIZER)
    with pytest.raises(EvaluationError, match="set.parquet: named twice"):
        problems.read([tmp_path / "set.parquet", tmp_path / "other/set.parquet"], TOKENIZER)


def test_samples_per_set_are_checked(write):
    found = problems.read([write(rows_of("aime24", 1))], TOKENIZER)
    assert problems.samples_of(found, 1, ["aime24=32"]) == {"aime24": 32}
    with pytest.raises(EvaluationError, match="did you mean aime24"):
        problems.samples_of(found, 1, ["aime=32"])
    for entry in ("aime24", "aime24=0", "aime24=x"):
        with pytest.raises(EvaluationError, match="write SET=N"):
            problems.samples_of(found, 1, [entry])


def test_missing_arguments_are_asked_for(write, model, tmp_path):
    file = write(rows_of("a", 1))
    for arguments in ([file], [file, "--model", model], ["--model", model, "--out", tmp_path / "o"]):
        done = run(*arguments)
        assert done.exit_code == 1
        assert "give FILE..., --model and --out, or --validation DIR" in done.output
    assert run(file, "--model", model, "--out", tmp_path / "o", "--grader-arg", "x").exit_code == 1


# ---- resuming ----


def test_what_is_finished_is_not_asked_for_again(write, model, fake, tmp_path):
    there = fake()
    options = (write(rows_of("a", 5)), "--model", model, "--out", tmp_path / "out", "-n", 2)
    assert run(*options, "--server", there.url).exit_code == 0
    first = sets(tmp_path / "out")
    assert run(*options, "--server", "http://127.0.0.1:9").exit_code == 0, "no server is needed any more"
    assert sets(tmp_path / "out") == first
    assert len(there.requests) == 10


def test_a_line_cut_short_is_drawn_again_and_nothing_else(write, model, fake, tmp_path):
    there = fake()
    out = tmp_path / "out"
    options = (write(rows_of("a", 5)), "--model", model, "--out", out, "-n", 2, "--server", there.url)
    run(*options)
    before = (out / "samples.jsonl").read_bytes()
    lost = json.loads(before.splitlines()[-1])
    (out / "samples.jsonl").write_bytes(before[:-20])
    there.requests.clear()
    assert run(*options).exit_code == 0
    assert [body["seed"] for body in there.requests] == [lost["seed"]]
    assert (out / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("--temperature", 1), "temperature was 0.6 and is 1.0"),
        (("-n", 3), "samples was {'a': 2} and is {'a': 3}"),
        (("--seed", 1), "seed was 0 and is 1"),
        (("--grader-arg", "x=1"), "grader was"),
        (("--max-tokens", 16), "max_tokens was 32 and is 16"),
    ],
)
def test_other_arguments_are_refused(write, model, fake, tmp_path, change, key):
    there = fake()
    options = (write(rows_of("a", 2)), "--model", model, "--out", tmp_path / "out", "-n", 2, "--server", there.url)
    run(*options)
    done = run(*options, *change)
    assert done.exit_code == 1
    assert key in done.output
    assert "another --out" in done.output
    assert len(there.requests) == 4


def test_other_data_or_weights_under_the_same_path_are_refused(write, model, fake, tmp_path):
    there = fake()
    options = ("--model", model, "--out", tmp_path / "out", "--server", there.url)
    run(write(rows_of("a", 2)), *options)
    rows = rows_of("a", 2)
    rows[1]["reward_model"]["ground_truth"] = "7"
    done = run(write(rows), *options)
    assert done.exit_code == 1
    assert "problems was" in done.output
    file = write(rows_of("a", 2))
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    done = run(file, *options)
    assert done.exit_code == 1
    assert "weights was" in done.output
    assert "problems was" not in done.output


def test_damaged_lines_and_strange_folders_are_named(tmp_path):
    with store.Store(tmp_path, {"a": 1}) as kept:
        kept.add({"problem": "p", "sample": 0, "correct": True})
        with pytest.raises(EvaluationError, match="another evaluation is writing there"):
            store.Store(tmp_path, {"a": 1})
    file = tmp_path / "samples.jsonl"
    file.write_text(f'{{"problem": "p"}}\n{file.read_text()}')
    with pytest.raises(EvaluationError, match=r"samples.jsonl: line 1 is damaged \(KeyError"):
        store.Store(tmp_path, {"a": 1})
    (tmp_path / "header.json").unlink()
    with pytest.raises(EvaluationError, match=r"samples.jsonl without header.json"):
        store.Store(tmp_path, {"a": 1})


def test_a_failure_is_forgotten_once_the_sample_is_there(tmp_path):
    key = {"problem": "p", "sample": 0}
    with store.Store(tmp_path, {}) as kept:
        kept.add({**key, "error": "x"})
        assert list(kept.failed) == [("p", 0)]
        kept.add({**key, "correct": True})
        assert not kept.failed
    with store.Store(tmp_path, {}) as kept:
        assert (list(kept.finished), list(kept.failed)) == ([("p", 0)], [])


def test_a_killed_evaluation_goes_on_without_drawing_or_grading_anything_twice(write, model, fake, tmp_path):
    graded = tmp_path / "graded"
    grader = tmp_path / "mine.py"
    grader.write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom data_prep.testbed import grader\n\n"
        "def compute_score(solution_str, **row):\n"
        f"    open({str(graded)!r}, 'a').write(solution_str + '\\n')\n"
        "    return grader.compute_score(solution_str=solution_str, **row)\n"
    )

    def slow(body):
        time.sleep(0.02)
        return rf"\boxed{{{question(body)[1]}}} {body['seed']}"

    there = fake(slow)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "verl_prefix.cli", "eval", write(rows_of("a", 60)), "--model", model, "--out", out]
    command += ["-n", "4", "--server", there.url, "--max-tokens", "32", "--grader", grader, "--concurrency", "4"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "samples.jsonl").exists() or len(lines_complete(out)) < 50:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # what the server was still at
    asked, kept = Counter(body["seed"] for body in there.requests), lines_complete(out)
    assert 50 <= len(kept) < 240
    in_flight = set(asked) - {record["seed"] for record in kept}
    assert len(in_flight) <= 4 + 1
    there.requests.clear()
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout
    again = Counter(body["seed"] for body in there.requests)
    assert set(again.values()) == {1}
    assert not set(again) & {record["seed"] for record in kept}
    records = lines(out)
    assert len({(record["problem"], record["sample"]) for record in records}) == len(records) == 240
    assert records[: len(kept)] == kept
    repeated = [line for line, count in Counter(graded.read_text().splitlines()).items() if count > 1]
    assert len(repeated) <= 4, "only what was graded and not yet written when the kill came"
    assert sets(out)["a"]["avg"]["value"] == 1.0


def lines_complete(out):
    content = (out / "samples.jsonl").read_text()
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


# ---- checkpoints ----


def test_checkpoints_are_found_and_what_has_no_weights_says_how_to_merge(model, tmp_path, monkeypatch):
    assert checkpoints.resolve(str(model)) == str(model.resolve())
    assert checkpoints.resolve("Qwen/Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    step = tmp_path / "checkpoints/global_step_10"
    exported = step / "actor/huggingface"
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    (step / "actor/model_world_size_1_rank_0.pt").write_bytes(b"")
    with pytest.raises(EvaluationError, match="holds fsdp shards, not merged weights") as refused:
        checkpoints.resolve(str(step))
    command = next(line for line in str(refused.value).splitlines() if line.startswith("python -m"))
    assert command.split()[:4] == ["python", "-m", "verl.model_merger", "merge"]
    from verl.model_merger.base_model_merger import parse_args

    monkeypatch.setattr(sys, "argv", command.split()[2:])
    merge = parse_args()
    assert (merge.backend, merge.local_dir) == ("fsdp", str(step / "actor"))
    with pytest.raises(EvaluationError, match="name one, e.g. .*global_step_10"):
        checkpoints.resolve(str(step.parent))
    (exported / "model.safetensors").write_bytes(b"1")
    assert checkpoints.resolve(str(step)) == str(exported.resolve())
    merged = Path(merge.target_dir)
    merged.mkdir()
    for file in exported.iterdir():
        file.rename(merged / file.name)
    assert checkpoints.resolve(str(step)) == str(merged.resolve())
    for missing in ("./nowhere", "/no/where", "a/b/c"):
        with pytest.raises(EvaluationError, match="does not exist"):
            checkpoints.resolve(missing)
    with pytest.raises(EvaluationError, match="no config.json with weights"):
        checkpoints.resolve(str(tmp_path))


def test_megatron_shards_say_so(tmp_path):
    (tmp_path / "actor/model/dist_ckpt").mkdir(parents=True)
    with pytest.raises(EvaluationError, match="--backend megatron"):
        checkpoints.resolve(str(tmp_path))


def test_fingerprints_tell_weights_apart(tmp_path):
    file = tmp_path / "model.safetensors"
    seen = set()
    for content in (b"a" * 300_000, b"a" * 300_001, b"a" * 299_999 + b"b", b"b" + b"a" * 299_999):
        file.write_bytes(content)
        seen.add(checkpoints.fingerprint(str(tmp_path)))
    assert len(seen) == 4
    assert checkpoints.fingerprint(str(tmp_path)) in seen


# ---- the server started here ----


@pytest.fixture
def fake_module(monkeypatch):
    monkeypatch.setattr(server, "MODULE", "fake_vllm")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid=None):
    return set(map(int, Path(f"/proc/{pid or os.getpid()}/task/{pid or os.getpid()}/children").read_text().split()))


def test_a_server_is_started_and_stopped(write, model, tmp_path, fake_module):
    out = tmp_path / "out"
    before = children()
    done = run(write(rows_of("a", 2)), "--model", model, "--out", out, "--serve-args", r"--reply '\boxed{1}'")
    assert done.exit_code == 0, done.output
    assert sets(out)["a"]["avg"]["value"] == 0.5
    assert children() == before
    assert "no /tokenize" in done.output


def test_a_server_that_cannot_start_shows_its_log(write, model, tmp_path, fake_module):
    done = run(write(rows_of("a", 2)), "--model", model, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "vLLM did not get as far as to answer" in done.output
    assert "no --reply: cannot start" in done.output


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_server_dies_with_a_killed_evaluation(tmp_path):
    program = (
        "import time\nfrom pathlib import Path\nfrom verl_prefix.evaluation import server\n"
        "server.MODULE = 'fake_vllm'\n"
        f"with server.local('m', ['--reply', 'x'], Path({str(tmp_path / 'log')!r})):\n"
        "    print('up', flush=True)\n    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    (pid,) = children(process.pid)
    assert alive(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


# ---- verl's validation ----


@pytest.fixture
def dump(tmp_path):
    """dump(entries, step): written by verl's own function; an entry is (uid, session, output, row, score, more)."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    def write(entries, step=4, acc=True):
        rows = [entry[3] for entry in entries]
        text = [TOKENIZER.decode(ids(row), skip_special_tokens=True) for row in rows]
        extra = {"reward": [e[4] for e in entries], "uid": [f"{e[0]}_{e[1]}_{e[2]}" for e in entries]}
        if acc:
            extra["acc"] = [e[4] > 0 for e in entries]
        truths = [row["reward_model"]["ground_truth"] for row in rows]
        scores = [e[4] for e in entries]
        PPOTrainer._write_generations(text, ["r"] * len(rows), truths, scores, extra, str(tmp_path / "val"), step)
        return tmp_path / "val"

    return write


def ids(row):
    return TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)


def test_verls_dump_goes_through_the_same_estimator(write, model, dump, tmp_path):
    a, b = rows_of("a", 2), rows_of("b", 1)
    entries = [("u-0", s, 0, a[0], -1.0 if s else 1.0) for s in range(4)]
    entries += [("u-1", s, 0, a[1], -1.0) for s in range(4)] + [("u-2", s, 0, b[0], 1.0) for s in range(4)]
    folder = dump(entries)
    dump([("u-0", 0, 0, a[0], 1.0)], step=2)
    options = ("--validation", folder, "--out", tmp_path / "out")
    done = run(*options, write([*a, *b]), "--model", model)
    assert done.exit_code == 0, done.output
    found = sets(tmp_path / "out")
    assert found["a"]["avg"]["value"] == pytest.approx(1 / 8)
    assert found["a"]["pass@2"]["value"] == pytest.approx((1 / 2) / 2)
    assert found["b"]["avg"]["value"] == 1
    assert "4.jsonl" in done.output
    done = run(*options)
    assert sets(tmp_path / "out")[validation.ALL]["avg"]["value"] == pytest.approx((1 / 4 + 0 + 1) / 3)
    run(*options, "--step", 2)
    assert sets(tmp_path / "out")[validation.ALL]["problems"] == 1


def test_an_evaluation_is_not_overwritten_by_one_of_a_dump(dump, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/header.json").write_text("{}")
    folder = dump([("u-0", 0, 0, rows_of("a", 1)[0], 1.0)])
    done = run("--validation", folder, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "Choose another folder" in done.output
    assert not (tmp_path / "out/summary.json").exists()


def test_line_ends_of_text_do_not_end_a_line_of_the_dump(dump):
    file = dump([("u", 0, 0, rows_of("a", 1)[0], 1.0)]) / "4.jsonl"
    entry = {**json.loads(file.read_bytes()), "output": "a\u2028b\u2029c\x85d"}
    file.write_bytes(json.dumps(entry, ensure_ascii=False).encode() + b"\n")  # as verl writes them
    (record,) = validation.read(file)
    assert record["grade"]["output"] == entry["output"]


def test_rollouts_that_verl_lost_are_reported(write, model, dump, tmp_path):
    a = rows_of("a", 2)
    folder = dump([("u-0", s, 0, a[0], 1.0) for s in range(4)] + [("u-1", 0, 0, a[1], -1.0)])
    done = run("--validation", folder, write(a), "--model", model, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "3 samples have no grade" in done.output
    assert sets(tmp_path / "out")["a"]["avg"]["value"] == 0.5
    more = write([*a, *rows_of("b", 1), *rows_of("a", 3)[2:]])  # two rows of which verl lost everything
    assert "8 samples have no grade" in run("--validation", folder, more, "--model", model).output


def test_of_several_outputs_the_last_one_counts(dump):
    row = rows_of("a", 1)[0]
    folder = dump([("u_x", 0, 0, row, -1.0), ("u_x", 0, 10, row, 1.0), ("u_x", 0, 9, row, -1.0)])
    (record,) = validation.read(folder / "4.jsonl")
    assert (record["problem"], record["sample"], record["correct"]) == ("u_x", 0, True)


def test_a_dump_without_acc_needs_scores_of_0_and_1(dump):
    row = rows_of("a", 1)[0]
    assert validation.read(dump([("u", 0, 0, row, 1.0)], acc=False) / "4.jsonl")[0]["correct"]
    with pytest.raises(EvaluationError, match="line 1: score is -1.0"):
        validation.read(dump([("u", 0, 0, row, -1.0)], acc=False) / "4.jsonl")


def test_dumps_that_do_not_fit_are_named(write, dump, tmp_path):
    a = rows_of("a", 2)
    folder = dump([("u", 0, 0, a[1], 1.0)])
    known = problems.read([write(a[:1])], TOKENIZER)
    with pytest.raises(EvaluationError, match="4.jsonl: line 1: its prompt and answer are in none of the files"):
        validation.read(folder / "4.jsonl", known, TOKENIZER)
    same = [a[0], {**a[0], "data_source": "b"}]
    with pytest.raises(EvaluationError, match="the same prompt and answer are in a too"):
        validation.read(folder / "4.jsonl", problems.read([write(same)], TOKENIZER), TOKENIZER)
    with pytest.raises(EvaluationError, match="--step 3: .* has 4"):
        validation.latest(folder, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="trainer.validation_data_dir"):
        validation.latest(tmp_path / "empty")
    (folder / "4.jsonl").write_text('{"input": "x", "output": "y"}\n')
    with pytest.raises(EvaluationError, match="line 1 is not of a verl 0.9.1 dump .KeyError: 'uid'"):
        validation.read(folder / "4.jsonl")


def test_a_grader_that_is_not_there_is_named(write, model, tmp_path):
    from verl_prefix.evaluation import grading

    for spec in ("nowhere.py", "nowhere.py:judge", "data_prep/testbed/grader.py:judge", "pkg://no.where"):
        with pytest.raises(PrefixConfigError, match="--grader"):
            grading.load(spec, {})
    assert callable(grading.load("data_prep/testbed/grader.py:compute_score", {}))


# ---- recipes ----


def test_the_papers_recipe_converts_once_and_asks_for_its_samples(model, tmp_path):
    from data_prep.sources import EVALUATION

    record = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/verl-prefix"
    program.write_text(f'#!/bin/bash\nprintf "%q " "$@" >>{record}\necho >>{record}\n[ "$1" = eval ] || touch "$6"\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "MODEL": str(model), "DATA": str(tmp_path / "d"), "OUT": "o"}

    def call(**more):
        record.write_text("")
        command = ["bash", "recipes/eval_paper.sh", "--seed", "3"]
        done = subprocess.run(command, cwd=ROOT, env={**env, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in record.read_text().splitlines()]

    *converted, evaluated = call()
    sources = [source.name for source in EVALUATION]
    assert converted == [["data", "convert", "--source", n, "--out", f"{tmp_path}/d/{n}.parquet"] for n in sources]
    assert [file for file in evaluated if file.endswith(".parquet")] == [f"{tmp_path}/d/{n}.parquet" for n in sources]
    assert [evaluated[i + 1] for i, word in enumerate(evaluated) if word == "--n-of"] == [
        "aime24=32", "aime25=32", "amc23=32",
    ]  # fmt: skip
    settings = {evaluated[i]: evaluated[i + 1] for i in range(len(evaluated) - 1)}
    assert (settings["--temperature"], settings["--max-tokens"]) == ("0.6", "8192")
    assert settings["--serve-args"] == "--data-parallel-size 8"
    assert evaluated[-2:] == ["--seed", "3"]
    assert call() == [evaluated], "nothing is converted twice"
    assert "--n-of" not in call(SETS="math500")[-1]
    # the real command takes these options, and gets as far as the files that the fake has left empty
    assert "aime24.parquet: is not a readable parquet file" in CliRunner().invoke(cli.app, evaluated).output


# ---- the real server ----


@pytest.mark.slow
@pytest.mark.e2e
def test_the_testbeds_model_on_a_real_vllm_server(testbed, tmp_path):
    """The base model's accuracy is known from its own gates: easy 0.15 to 0.35, hard at most 0.01, at T = 1."""
    out = tmp_path / "out"
    command = ["bash", "recipes/eval_cpu.sh", testbed, testbed / "model", out, "-n", "2"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    found = sets(out)
    assert {name: (of["problems"], of["n"], of["not_graded"]) for name, of in found.items()} == {
        "chain_easy": (task.PROMPTS_PER_KIND, 2, 0),
        "chain_hard": (task.PROMPTS_PER_KIND, 2, 0),
    }
    assert 0.15 <= found["chain_easy"]["avg"]["value"] <= 0.35
    assert found["chain_hard"]["avg"]["value"] <= 0.01
    # another format than training's prompt would be continued with other lengths
    assert found["chain_easy"]["response_tokens"] == pytest.approx(27, abs=0.5)
    assert found["chain_easy"]["cut_share"] < 0.02
    records = lines(out)
    assert len({record["response"] for record in records}) > 500, "samples of a problem differ"
    log = (out / "server.log").read_text()
    port = re.search(r"127\.0\.0\.1:(\d+)", log)[1]
    with pytest.raises(EvaluationError):
        server.find(f"http://127.0.0.1:{port}")
