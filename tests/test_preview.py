"""`verl-prefix preview`: the same draws as the agent loop's, what is printed, what is warned of, what is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from typer.testing import CliRunner
from verl.experimental.agent_loop.agent_loop import DictConfigWrap

from data_prep.testbed import task
from data_prep.testbed.tokenizer import build_tokenizer
from verl_prefix import cli, custom_grader, presets, preview, preview_rows, terminal, tokenizers
from verl_prefix.agent_loop import PrefixAgentLoop
from verl_prefix.config import DemonstrationConfig, PrefixConfig
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError

LIMIT, PROMPT_LIMIT = 32, 16
PROBLEMS = [task.Problem(start, operations) for start, operations in ((3, "agbhci"), (1, "aaabbb"), (5, "ghighi"))]
TOKENIZER = build_tokenizer()
GRADER = "data_prep/testbed/grader.py"


def prompt(problem=PROBLEMS[0]):
    return [{"role": "user", "content": task.render_prompt(problem)}]


def solution(problem=PROBLEMS[0]):
    return task.render_solution(problem)


def answer(problem=PROBLEMS[0]):
    return solution(problem).split("{")[1].rstrip("}")


def rows_of(demos, problems=PROBLEMS):
    """Columns of a correct training file with these demonstration cells."""
    used = [problems[i % len(problems)] for i in range(len(demos))]
    return {
        "data_source": ["chain_hard"] * len(demos),
        "prompt": [prompt(problem) for problem in used],
        "reward_model": [{"style": "rule", "ground_truth": answer(problem)} for problem in used],
        "extra_info": [{"split": "train", "index": i} for i in range(len(demos))],
        "demos": demos,
    }


@pytest.fixture
def write(tmp_path):
    """write(demos=None, **columns) -> path of a parquet file; `None` for a column leaves it out."""

    def file(demos=None, name="train.parquet", row_group_size=None, **columns):
        demos = [[solution(problem)] for problem in PROBLEMS] if demos is None else demos
        made = {k: v for k, v in {**rows_of(demos), **columns}.items() if v is not None}
        pq.write_table(pa.table(made), tmp_path / name, row_group_size=row_group_size)
        return str(tmp_path / name)

    return file


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda path: TOKENIZER)


def run(file, *options, grader=GRADER):
    limits = ("--response-length", str(LIMIT), "--prompt-length", str(PROMPT_LIMIT))
    given = ("--grader", grader) if grader else ()
    return CliRunner().invoke(cli.app, ["preview", file, "--tokenizer", "model", *limits, *given, *options])


def objects(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


class Server:
    """Answers every request with one token."""

    async def generate(self, **kwargs):
        return SimpleNamespace(
            token_ids=[ord("0")], log_probs=None, num_preempted=None, routed_experts=None, extra_fields={}
        )


def trained(config, row, steps, n=8):
    """What the agent loop makes of a row: every prefixed rollout of its n sessions at each step."""
    made = []

    async def rollouts():
        section = OmegaConf.create(
            {
                "actor_rollout_ref": {"rollout": {"prompt_length": PROMPT_LIMIT, "response_length": LIMIT}},
                "data": {},
                "prefix": OmegaConf.structured(config),
            }
        )
        loop = PrefixAgentLoop(
            trainer_config=DictConfigWrap(section),
            server_manager=Server(),
            tokenizer=TOKENIZER,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(section.data),
            hf_model_type="qwen2",
        )
        for step in steps:
            for session in range(n):
                row_of_run = {
                    "raw_prompt": row.prompt,
                    "uid": "u",
                    "session_id": session,
                    "global_steps": step,
                    "index": row.index,
                    "demos": row.demonstrations,
                    "demos_steps": row.steps,
                }
                output = await loop.run({"temperature": 1.0}, **row_of_run)
                if output.prefix_len:
                    record = output.extra_fields["prefix"]
                    made.append(
                        {
                            "row_index": row.index,
                            "session": session,
                            "step": step,
                            "prefix_len": output.prefix_len,
                            "demo_len": record["demo_len"],
                            "low": record["low"],
                            "high": record["high"],
                            "prefix_ids": output.response_ids[: output.prefix_len],
                        }
                    )
                assert output.prompt_ids == list(preview.prompt_ids(TOKENIZER, row))

    asyncio.run(rollouts())
    return made


def row(index=5, demos=None, number=0, problem=PROBLEMS[0], **more):
    fields = {"data_source": "chain_hard", "ground_truth": answer(problem), "extra_info": {}} | more
    demos = [solution(problem)] if demos is None else demos
    return preview_rows.Row(number=number, index=index, prompt=prompt(problem), demonstrations=demos, **fields)


demonstration = st.one_of(
    st.text("0123456789agh", max_size=40),
    st.sampled_from([solution(), "1<|im_end|>2", "12<|im_end|>", " ", "0" * (LIMIT - 1), "0" * LIMIT]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    demos=st.one_of(st.none(), st.lists(demonstration, max_size=4)),
    index=st.one_of(st.integers(0, 2**40), st.text(max_size=8)),
    steps=st.lists(st.integers(1, 700), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 99),
    rollouts=st.integers(0, 4),
    shared=st.booleans(),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    beta=st.sampled_from([(1.0, 1.0), (2.0, 5.0)]),
    demo_ratio=st.sampled_from([0.0, 0.5, 1.0]),
    min_prefix_len=st.integers(1, 20),
)
def test_draws_are_the_agent_loops(
    demos, index, steps, seed, rollouts, shared, kind, warmup, beta, demo_ratio, min_prefix_len
):
    config = PrefixConfig.of(
        {
            "seed": seed,
            "demonstrations": {"demo_ratio": demo_ratio},
            "schedule": {"kind": kind, "warmup": warmup},
            "sampling": {
                "rollouts": rollouts,
                "shared": shared,
                "beta_a": beta[0],
                "beta_b": beta[1],
                "min_prefix_len": min_prefix_len,
            },
        }
    )
    made = row(index, demos if demos is not None else [])
    shown = preview.prefixed_rollouts(config, [made], steps, TOKENIZER, LIMIT)
    assert [rollout.as_dict() for rollout in shown] == trained(config, made, steps)


def test_hints_at_steps_are_trainings(write):
    texts = [solution(problem) for problem in PROBLEMS]
    file = write(
        [[text[::-1], text] for text in texts],
        demos_steps=[[[1], [2, 5, len(text)]] for text in texts],
        demos_correct=[[False, True]] * len(texts),
    )
    steps = range(1, 310, 20)
    result = run(file, "--json", "--preset", "uft", "-n", "99", "--steps", ",".join(map(str, steps)))
    assert result.exit_code == 0, result.stderr
    config = presets.compose("uft")
    rows, _ = preview_rows.read(file, DemonstrationConfig(), None)
    wanted = [made for row_of_file in rows for made in trained(config, row_of_file, steps, n=4)]
    assert objects(result) == wanted
    assert {made["prefix_len"] for made in wanted} == {2, 5, *(len(text) - 1 for text in texts)}


def test_json_is_what_training_makes_of_the_same_file(write):
    file = write([[solution(p)] if i % 2 else [] for i, p in enumerate(PROBLEMS * 3)])
    options = ("--json", "-n", "99", "--steps", "1,250,500", "--set", "prefix.sampling.rollouts=2")
    result = run(file, *options, "--set", "prefix.seed=7")
    assert result.exit_code == 0, result.stderr
    config = PrefixConfig.of({"seed": 7, "sampling": {"rollouts": 2}})
    rows, _ = preview_rows.read(file, DemonstrationConfig(), None)
    wanted = [rollout for row_of_file in rows for rollout in trained(config, row_of_file, (1, 250, 500))]
    assert objects(result) == wanted
    assert len(wanted) == 4 * 3 * 2
    for found in objects(result):
        assert list(found) == [
            "row_index",
            "session",
            "step",
            "prefix_len",
            "demo_len",
            "low",
            "high",
            "prefix_ids",
        ]
        assert len(found["prefix_ids"]) == found["prefix_len"] < found["demo_len"]
        assert TOKENIZER.decode(found["prefix_ids"]) in solution(PROBLEMS[found["row_index"] % 3])


def test_stdout_carries_json_only(write, tmp_path):
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    print('hi')\n    return 0"
    )
    result = run(write(), "--json", grader=str(noisy))
    assert all(objects(result))
    assert "answer not reached" in result.stderr
    assert "hi" in result.stderr


def test_a_correct_file_is_silent_and_shown_with_its_cut(write):
    result = run(write(), "--steps", "1,500", "-n", "1")
    assert result.exit_code == 0
    assert "warning" not in result.stderr
    text = solution(PROBLEMS[0])
    for step in (1, 500):
        (rollout,) = preview.prefixed_rollouts(PrefixConfig(), [row(index=0)], [step], TOKENIZER, LIMIT)
        cut = rollout.draw.prefix_len  # one character, one token
        assert f"step {step}, rollout 0: prefix {cut}/{len(text)} tokens" in result.stdout
        assert f"{text[:cut]}▏{text[cut:]}" in result.stdout
    assert task.render_prompt(PROBLEMS[0]) in result.stdout
    assert "3 of 3 rows looked at" in result.stdout


def test_text_of_the_file_cannot_steer_the_terminal(write):
    steering = "[red]\x1b[2J\x1b]0;x\x07 \u202e"
    result = run(write([[solution()]], prompt=[[{"role": "user", "content": steering}]]), "--prompt-length", "99")
    assert "[red]\\x1b[2J" in result.stdout
    assert "\\u202e" in result.stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout)


@given(st.text())
def test_printable_leaves_no_control_character(text):
    shown = terminal.printable(text)
    assert not {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n", "\t"}
    assert terminal.printable("a [b] ü 数\n") == "a [b] ü 数\n"


@given(st.text(max_size=60), st.integers(0, 20), st.integers(0, 20))
def test_elided_text_keeps_its_ends(text, head, tail):
    short = terminal.elide(text, head, tail)
    if len(text) <= head + tail:
        assert short == text
    else:
        assert short == f"{text[:head]} [... {len(text) - head - tail} characters ...] {text[len(text) - tail :]}"


@given(st.integers(0, 300), st.integers(0, 300))
def test_spread_is_even(total, count):
    picks = preview_rows.spread(total, count)
    assert len(picks) == min(total, count)
    assert picks == sorted(set(picks))
    assert all(0 <= pick < total for pick in picks)
    gaps = [b - a for a, b in zip(picks, picks[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("group", [1, 3, 7, 1000])
def test_a_sample_is_the_rows_it_says(write, group):
    file = write([[solution()]] * 100, row_group_size=group)
    rows, total = preview_rows.read(file, DemonstrationConfig(), 10)
    assert total == 100
    assert [r.number for r in rows] == [r.index for r in rows] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert [r.index for r in preview_rows.read(file, DemonstrationConfig(), None)[0]] == list(range(100))


def test_json_lines_read_like_parquet(write, tmp_path):
    file = write()
    lines = tmp_path / "train.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in pq.read_table(file).to_pylist()))
    assert run(str(lines), "--json").stdout == run(file, "--json").stdout != ""


def test_picture(write, tmp_path):
    from PIL import Image

    picture = tmp_path / "deep/er/look.png"
    assert run(write(), "--picture", str(picture)).exit_code == 0
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert 1200 <= image.width <= 2400
        assert 400 <= image.height <= 900
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert run(write([["0" * 50]] * 2), "--picture", str(tmp_path / "none.png")).exit_code == 1
    assert (tmp_path / "none.png").stat().st_size > 10_000


BAD_TRUTH = [{"style": "rule", "ground_truth": "no"}] + [
    {"style": "rule", "ground_truth": answer(p)} for p in PROBLEMS[1:]
]


@pytest.mark.parametrize(
    ("file", "options", "parts", "warnings"),
    [
        (
            {"demos": [[solution()], [], [""]]},
            (),
            ["2 of 3 rows (67 %) without a usable", "1 have none at all", "is empty"],
            2,
        ),
        (
            {"demos": [[solution(), "0" * LIMIT]]},
            (),
            ["overlong: 1 of 2 demonstrations", "longest 32", "to 33 for all"],
            1,
        ),
        ({"demos": [[solution(), "1<|im_end|>2"]]}, (), ["special tokens: 1 of 2 demonstrations"], 1),
        ({"demos": [[solution(), "0"]]}, (), ["1 of 2 demonstrations (50 %) cannot be used", "fewer than 2 tokens"], 1),
        (
            {},
            ("--prompt-length", "8"),
            ["3 of 3 prompts", "of more than 8 tokens (longest 9; row 0, 1, 2 of the file)"],
            1,
        ),
        ({"extra_info": [{"index": 0}] * 3}, (), ["extra_info.index takes only 1 values in 3 rows"], 1),
        ({"extra_info": None}, (), ["extra_info.index takes only 1 values in 3 rows"], 1),
        (
            {"reward_model": BAD_TRUTH},
            (),
            ["answer not reached", "gives 0 to 1 of 3 demonstrations (33 %), row 0 of"],
            1,
        ),
        ({"reward_model": None}, (), ["3 of 3 rows (100 %) without reward_model.ground_truth"], 1),
        ({}, ("--preset", "grpo"), ["preset grpo prefixes no rollout", "choose prefix_rft"], 1),
    ],
)
def test_each_warning(write, file, options, parts, warnings):
    result = run(write(**file), *options)
    assert result.exit_code == 0, result.stderr
    for part in parts:
        assert part in result.stderr
    assert result.stderr.count("warning ") == warnings


def test_a_grader_that_raises_warns(write, tmp_path):
    grader = tmp_path / "grader.py"
    grader.write_text("def compute_score(**kwargs):\n    raise ValueError('boom')")
    result = run(write(), grader=str(grader))
    assert "the grader raised on 3 of 3 demonstrations (100 %) (ValueError: boom)" in result.stderr
    assert "answer not reached" not in result.stderr


def test_graders_are_called_as_verl_calls_them(tmp_path):
    for body, score in (("return {'score': 0.5}", 0.5), ("return True", 1.0), ("return {'score': ground_truth}", 3.0)):
        for head in ("def", "async def"):
            file = tmp_path / "grader.py"
            file.write_text(
                f"{head} compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    {body}"
            )
            assert custom_grader.load(str(file))(row(ground_truth="3"), "text") == score


def test_without_a_name_the_grader_is_the_projects(write):
    truths = [{"style": "rule", "ground_truth": truth} for truth in ("1/2", "0.5", "3")]
    file = write([["so \\boxed{\\frac12}"]] * 3, reward_model=truths)
    result = run(file, grader=None)
    assert "gives 0 to 1 of 3 demonstrations (33 %), row 2 of the file" in result.stderr
    assert run(file, grader="pkg://verl_prefix.reward").stderr == result.stderr


def test_a_project_grader_that_cannot_be_imported_is_one_warning(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl_prefix.reward", None)
    result = run(write(), grader=None)
    assert result.exit_code == 0
    assert result.stderr.count("warning ") == 1
    assert "answers are not graded" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("x = 1", "no function compute_score"), ("1 / 0", "ZeroDivision")],
)
def test_bad_grader_files(write, tmp_path, text, message):
    file = tmp_path / "grader.py"
    if text is not None:
        file.write_text(text)
    for path in (str(file), f"file://{file}"):
        result = run(write(), grader=path)
        assert result.exit_code == 1
        assert message in result.stderr


@pytest.mark.parametrize(
    ("demos", "options"),
    [([["0" * 50]] * 2, ()), ([[], []], ()), (None, ("--set", "prefix.demonstrations.demo_ratio=0"))],
)
def test_a_file_from_which_nothing_is_drawn_is_an_error(write, demos, options):
    result = run(write(demos), "--json", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "gets a prefix" in result.stderr


def refused(path, *options):
    result = run(str(path), "--json", *options)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_no_such_file(write, tmp_path):
    write()
    message = refused(tmp_path / "trian.parquet")
    assert "trian.parquet" in message
    assert "does not exist" in message
    assert f"Did you mean {tmp_path / 'train.parquet'}" in message
    assert "does not exist" in refused(tmp_path / "nowhere/train.parquet")
    (tmp_path / "train.csv").write_text("a,b")
    assert "verl reads .parquet" in refused(tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": None}, "has no column 'prompt', only data_source"),
        ({"demos": None}, "has no column 'demos'"),
        ({"prompt": ["1", "2", "3"]}, "row 0, prompt is '1', not a list"),
        ({"prompt": [prompt(), None, prompt()]}, "row 1, prompt is 'None', not a list"),
        ({"prompt": [prompt(), [], prompt()]}, "row 1, prompt is '[]', not a list"),
        ({"extra_info": [{"index": 0}, {"index": None}, {"index": 2}]}, "row 1, extra_info.index is None"),
        ({"demos": [[1], [2], [3]]}, "row 0, demos[0] is int"),
        ({"agent_name": ["prefix_agent", "tool_agent", "prefix_agent"]}, "row 1, agent_name is 'tool_agent'"),
    ],
)
def test_bad_columns(tmp_path, columns, message):
    made = {**rows_of([[solution(p)] for p in PROBLEMS]), **columns}
    pq.write_table(pa.table({k: v for k, v in made.items() if v is not None}), tmp_path / "bad.parquet")
    found = refused(tmp_path / "bad.parquet")
    assert "bad.parquet: " + message in found


def test_damaged_files(write, tmp_path):
    file = write([[solution()]] * 50)
    whole = Path(file).read_bytes()
    damaged = tmp_path / "damaged.parquet"
    for content in (whole[: len(whole) // 2], b"", b"PAR1 not one", whole[:200] + b"\0" * 400 + whole[600:]):
        damaged.write_bytes(content)
        assert "damaged.parquet: cannot be read" in refused(damaged)
    lines = tmp_path / "damaged.jsonl"
    lines.write_text('{"prompt": [{"role": "user", "content": "1"}], "demos": ["12"]}\n{"prompt": [{"ro')
    assert "damaged.jsonl: cannot be read" in refused(lines)
    assert "has no rows" in refused(write([], name="empty.parquet", prompt=pa.array([], pa.list_(pa.string()))))


def test_text_that_is_not_utf8(tmp_path):
    demos = pa.ListArray.from_arrays([0, 1, 2, 3], pa.array([b"12", b"\xff1", b"34"]).cast(pa.string(), safe=False))
    columns = {**rows_of([[]] * 3), "demos": demos}
    try:
        pq.write_table(pa.table(columns), tmp_path / "bytes.parquet")
    except pa.ArrowInvalid:
        pytest.fail("Arrow refuses to write it: the case needs another way in")
    assert "bytes.parquet: row 1, column 'demos' is not UTF-8" in refused(tmp_path / "bytes.parquet")


def test_a_demonstration_of_10_megabytes(write):
    result = run(write([[solution()], ["1" * 10_000_000], [solution(PROBLEMS[2])]]), "--json")
    assert result.exit_code == 0
    assert "overlong: 1 of 3 demonstrations" in result.stderr
    assert {found["row_index"] for found in objects(result)} == {0, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "prefix_rtf"), "did you mean prefix_rft"),
        (("--preset", "zzz"), "did you mean adaptive or chord_mu"),
        (("--set", "prefix.shedule.steps=7"), "Did you mean prefix.schedule.steps?"),
        (("--set", "prefix.schedule.steps=seven"), "'seven'"),
        (("--set", "prefix.schedule.steps=0"), "prefix.schedule.steps=0: must be at least 1"),
        (("--set", "prefix.schedule.steps"), "has no value"),
        (("--set", "data.max_response_length=3"), "outside of the section"),
        (("--set", "prefix.schedule.kind={"), "cannot be composed"),
    ],
)
def test_bad_presets_and_overrides(write, options, message):
    assert message in refused(write(), *options)


@pytest.mark.parametrize("steps", ["", "1,x", "0", "-3", "1,,2", "1.5"])
def test_bad_steps(write, steps):
    result = run(write(), "--steps", steps)
    assert result.exit_code == 2
    assert "--steps" in result.stderr


def test_presets_compose_as_training_composes_them():
    assert {"dr_grpo", "grpo", "prefix_rft"} < set(presets.names())
    assert presets.compose("prefix_rft") == PrefixConfig()
    assert presets.compose("grpo", ["prefix.seed=3"]) == PrefixConfig.of(
        {"preset": "grpo", "seed": 3, "sampling": {"rollouts": 0}}
    )
    assert presets.compose("uft").sampling.rollouts == 4, "a reference to verl's own key is resolved"


def test_tokenizer_without_a_chat_template(write, monkeypatch):
    bare = build_tokenizer()
    bare.chat_template = None
    monkeypatch.setattr(tokenizers, "load", lambda path: bare)
    message = refused(write())
    assert "--tokenizer" in message
    assert "chat template cannot render the prompt of row 0" in message


def test_the_command_needs_no_verl_ray_or_vllm(write, tmp_path):
    """And the tokenizer comes from its folder; a wrong one is refused."""
    TOKENIZER.save_pretrained(tmp_path / "model")
    code = (
        "import sys\n"
        "for name in ('verl', 'ray', 'vllm'): sys.modules[name] = None\n"
        "from verl_prefix.cli import app\n"
        "app()"
    )
    command = [sys.executable, "-c", code, "preview", write(), "--json", "--grader", GRADER, "--tokenizer"]
    done = subprocess.run([*command, tmp_path / "model"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9
    done = subprocess.run([*command, tmp_path / "nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no tokenizer there" in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_the_projects_own():
    with pytest.raises(PrefixConfigError, match="did you mean"):
        presets.compose("prefix")
    with pytest.raises(DemonstrationError, match="prompt"):
        preview_rows._row("f", 0, {"prompt": "x"}, DemonstrationConfig())
