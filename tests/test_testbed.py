"""The CPU testbed of `data_prep/testbed`: task, grader, tokenizer, data files and the pretraining loop."""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from data_prep.testbed import __main__ as cli
from data_prep.testbed import base_model, grader, task, tokenizer

PROBLEMS = st.builds(task.Problem, st.integers(1, 10), st.text("abcdefghijkl", min_size=6, max_size=6))
MIX = {"demonstrations": 64, "easy_rows": 256, "hard_rows": 128, "demo_rows": 640}
QUICK = base_model.PretrainConfig(
    batch_size=4,
    learn_above=-1.0,
    habit_above=0.0,
    learn_max_steps=2,
    blur_min_steps=1,
    blur_max_steps=2,
    easy_range=(0.0, 1.0),
    hard_below=1.0,
    check_every=1,
    check_problems=4,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built():
    return tokenizer.build_tokenizer()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, built):
    """An untrained model and its tokenizer, saved as the testbed saves them."""
    folder = tmp_path_factory.mktemp("model")
    base_model.save(base_model.new_model(built, seed=0), built, folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cli.make_data(folder, {"seed": 0, "wrong_share": 0.0, **MIX})
    return folder


def evaluate_by_hand(prompt: str) -> str:
    """The answer worked out from the prompt text alone: counting on a ring of eleven digits, no arithmetic mod 11."""
    ring = "0123456789A"
    steps = {"a": 1, "b": 2, "c": 3, "d": 10, "e": 9, "f": 8}
    times = {"g": 2, "h": 3, "i": 4, "j": 5, "k": 6, "l": 7}
    place, answer = ring.index(prompt[0]), ""
    for letter in prompt[1:7]:
        walk = [steps[letter]] if letter in steps else [place] * (times[letter] - 1)
        for length in walk:
            for _ in range(length):
                place = 0 if place == 10 else place + 1
        answer += ring[place]
    return answer


# --- task


@given(PROBLEMS)
def test_solve_agrees_with_counting(problem):
    assert task.ground_truth(problem) == evaluate_by_hand(task.render_prompt(problem))


def test_every_fact_agrees_with_counting():
    for operation in task.OPERATIONS:
        for value in range(task.MODULUS):
            problem = task.Problem(value, operation * 6)
            assert task.ground_truth(problem) == evaluate_by_hand(task.render_prompt(problem))


def test_the_documented_example():
    problem = task.Problem(3, "agbhci")
    assert task.render_prompt(problem) == "3agbhci="
    assert task.render_solution(problem) == "a4g8bAh8c0i0\\boxed{48A800}"
    assert task.facts(problem) == {("g", 4), ("h", 10), ("i", 0)}
    assert problem.kind == "hard"


@given(PROBLEMS, st.randoms(use_true_random=False), st.integers(0, 5), st.integers(1, 10))
def test_solutions_are_graded_right_and_any_wrong_digit_is_not(problem, rng, place, shift):
    truth = task.ground_truth(problem)
    assert grader.compute_score("chain", task.render_solution(problem), truth) == {"score": 1.0, "acc": 1.0}
    wrong = task.solve(problem)
    wrong[place] = (wrong[place] + shift) % task.MODULUS
    assert grader.compute_score("chain", task.render_solution(problem, wrong), truth)["score"] == 0.0
    imitated = task.render_solution(problem, task.imitate(problem, rng, noise=0.2))
    assert re.fullmatch(r"([a-l][0-9A]){6}\\boxed\{[0-9A]{6}\}", imitated)


def test_imitation_is_right_on_known_operations_and_uniform_on_unknown_ones():
    rng = random.Random(0)
    easy = task.Problem(5, "abcdef")
    assert all(task.imitate(easy, rng) == task.solve(easy) for _ in range(50))
    noisy = [task.imitate(easy, rng, noise=0.2)[0] for _ in range(4000)]
    assert 0.77 < noisy.count(6) / 4000 < 0.83
    drawn = [task.imitate(task.Problem(5, "gaaaaa"), rng) for _ in range(4400)]
    counts = [[results[0] for results in drawn].count(value) for value in range(11)]
    assert min(counts) > 320
    assert max(counts) < 480
    assert all(results[1] == (results[0] + 1) % 11 for results in drawn)


@pytest.mark.parametrize("kind", task.KINDS)
def test_sampled_problems_are_of_their_kind(kind):
    for problem in task.sample_distinct(random.Random(1), kind, 500):
        unknown = sum(operation in task.UNKNOWN for operation in problem.operations)
        assert (3 <= unknown <= 5) if kind == "hard" else unknown == 0
        assert problem.kind == kind
        assert 1 <= problem.start <= 10


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="choose one of easy, hard"):
        task.sample_problem(random.Random(0), "medium")


@pytest.mark.parametrize("seed", range(4))
def test_splits_are_distinct_and_disjoint(seed):
    made = task.splits(seed)
    everything = [problem for split in made.values() for kind in split.values() for problem in kind]
    assert len(everything) == 4 * 256
    assert len(set(everything)) == len(everything)


def test_demonstrations_cover_the_unknown_facts():
    assert task.coverage(task.splits(0)["train"]["hard"][:64]) == 65
    assert all(task.coverage(task.splits(seed)["train"]["hard"][:64]) >= 63 for seed in range(1, 6))


def test_fewer_demonstrations_are_a_subset():
    def demonstrated(count):
        rows = task.train_rows(0, count, 8, 8, 4 * count)
        return {row["prompt"][0]["content"] for row in rows if row["demos"]}

    assert demonstrated(16) < demonstrated(64)
    assert (len(demonstrated(16)), len(demonstrated(64))) == (16, 64)


def test_a_share_of_the_demonstrations_is_wrong_and_nothing_says_which():
    def demonstrated(share):
        rows = task.train_rows(5, **MIX, wrong_share=share)
        return {row["prompt"][0]["content"]: row for row in rows if row["demos"]}

    def is_wrong(row):
        return grader.compute_score("chain_hard", row["demos"][0], row["reward_model"]["ground_truth"])["score"] == 0

    right, quarter, half = (demonstrated(share) for share in (0.0, 0.25, 0.5))
    wrong = [{prompt for prompt, row in rows.items() if is_wrong(row)} for rows in (right, quarter, half)]
    assert [len(found) for found in wrong] == [0, 16, 32]
    assert wrong[1] < wrong[2]
    assert all(row["demos_correct"] == [True] for row in right.values())
    assert all(row["demos_correct"] == [] for row in quarter.values())
    for prompt in right.keys() - wrong[2]:
        assert half[prompt]["demos"] == right[prompt]["demos"]
    for prompt in wrong[2]:  # its known operations are right: only the unknown facts are wrong
        steps = half[prompt]["demos"][0].split("\\")[0]
        value = task.DIGITS.index(prompt[0])
        for operation, result in zip(steps[::2], steps[1::2], strict=True):
            if operation in task.KNOWN:
                assert task.apply(operation, value) == task.DIGITS.index(result)
            value = task.DIGITS.index(result)


def test_a_testbed_of_other_pretraining_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "PretrainConfig", lambda: QUICK)
    options = ["--out", str(tmp_path), "--demonstrations", "2", "--easy-rows", "2", "--hard-rows", "2"]
    options += ["--demo-rows", "2"]
    assert CliRunner().invoke(cli.app, options).exit_code == 0
    monkeypatch.setattr(base_model, "PretrainConfig", lambda: replace(QUICK, habit=0.5))
    refused = CliRunner().invoke(cli.app, options)
    assert refused.exit_code == 2
    assert "--force" in refused.output


def test_rows_depend_on_the_seed_alone():
    random.seed(0)
    first = task.train_rows(3, **MIX)
    random.seed(1)
    assert task.train_rows(3, **MIX) == first
    assert task.train_rows(4, **MIX) != first
    assert task.val_rows(3) == task.val_rows(3)


@pytest.mark.parametrize("mix", [{"demonstrations": 257}, {"demonstrations": 256}, {"demonstrations": 0}])
def test_impossible_mixes_are_refused(mix):
    with pytest.raises(ValueError, match="demonstrations="):
        task.train_rows(0, **{**MIX, **mix})


# --- grader


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("a4\\boxed{48A800}", 1.0),
        ("\\boxed{48A801}", 0.0),
        ("\\boxed{000000} no: \\boxed{48A800}", 1.0),
        ("\\boxed{48A800} no: \\boxed{000000}", 0.0),
        ("\\boxed{48A800} and \\boxed{48A8", 0.0),
        ("\\boxed{48A800", 0.0),
        ("\\boxed{ 48A800}", 0.0),
        ("\\boxed{48a800}", 0.0),
        ("\\boxed{}", 0.0),
        ("48A800", 0.0),
        ("", 0.0),
        (None, 0.0),
        (480800, 0.0),
        (b"\\boxed{48A800}", 0.0),
        (["\\boxed{48A800}"], 0.0),
        ("x" * 1_000_000 + "\\boxed{48A800}", 1.0),
        ("\\boxed{" * 150_000, 0.0),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_grader_table(text, score):
    assert grader.compute_score("chain_hard", text, "48A800") == {"score": score, "acc": score}


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.text(), st.lists(st.text()), st.builds(object)
)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_grader_never_raises(source, solution, truth, extra):
    assert grader.compute_score(source, solution, truth, extra, reward_router_address=None)["score"] in (0.0, 1.0)


def test_grader_loads_by_path_and_imports_nothing_of_ours():
    path = Path(grader.__file__)
    imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert names <= {"__future__", "typing"}
    spec = importlib.util.spec_from_file_location("custom_module_1", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.compute_score("x", "\\boxed{1}", "1", extra_info={})["acc"] == 1.0


# --- tokenizer


def test_tokenizer_survives_auto_tokenizer(model_dir, built):
    loaded = tokenizer.assert_round_trip(model_dir)
    assert type(loaded).__name__ == "Qwen2Tokenizer"
    assert len(loaded) == 259
    for problem in task.splits(0)["train"]["hard"]:
        text = task.render_prompt(problem) + task.render_solution(problem)
        assert tokenizer.token_ids(loaded, text) == list(text.encode())
    assert tokenizer.token_ids(loaded, "\n") == [10]
    assert [loaded.convert_tokens_to_ids(token) for token in tokenizer.SPECIAL_TOKENS] == [256, 257, 258]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (256, 258)
    assert built.get_vocab() == loaded.get_vocab()


def test_prompt_and_response_have_the_documented_lengths(built):
    problem = task.Problem(3, "agbhci")
    ids = base_model.sequence_ids(built, problem, task.solve(problem))
    assert tokenizer.prompt_ids(built, "3agbhci=") == [*b"3agbhci=", 257]
    assert ids == [*b"3agbhci=", 257, *b"a4g8bAh8c0i0\\boxed{48A800}", 258]
    assert task.RESPONSE_TOKENS == 27
    sequences = base_model.Sequences(built, random.Random(0), ())
    assert sequences.encode([(problem, task.solve(problem))]) == [ids]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(max_codepoint=126)))
def test_token_id_is_the_byte(built, text):
    assert tokenizer.token_ids(built, text) == tokenizer.expected_ids(text)


def test_round_trip_check_catches_the_word_level_trap(tmp_path, built):
    """transformers loads this tokenizer as another class beside a qwen2 config, without a word."""
    words = Tokenizer(models.WordLevel({"3": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        tokenizer.assert_round_trip(tmp_path)
    base_model.model_config(built).save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="tokenised as"):
        tokenizer.assert_round_trip(tmp_path)


def test_template_fits_verls_continuous_tokens(model_dir):
    """Turns appended token by token give the same ids as rendering the whole conversation."""
    wiring = pytest.importorskip("verl.utils.tokenizer.continuous_token_wiring")
    loaded = AutoTokenizer.from_pretrained(model_dir)
    builder = wiring.create_continuous_token_builder(loaded, hf_model_type="qwen2")
    first = [{"role": "user", "content": "3agbhci="}]
    longer = [*first, {"role": "assistant", "content": "a4"}, {"role": "user", "content": "4aaaaaa="}]
    runtime = builder.build_initial_tokens(first)
    assert runtime == tokenizer.prompt_ids(loaded, "3agbhci=")
    runtime += tokenizer.token_ids(loaded, "a4" + tokenizer.END_OF_TURN)
    merged = builder.merge_context_tokens(longer[:2], longer, runtime)
    whole = loaded.apply_chat_template(longer, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert merged.token_ids == whole


# --- data files


def test_train_file(data_dir):
    table = pq.read_table(data_dir / "train.parquet")
    assert table.schema.equals(cli.TRAIN_SCHEMA)
    rows = table.to_pylist()
    kinds = [row["extra_info"]["kind"] for row in rows]
    assert [kinds.count(kind) / len(rows) for kind in ("easy", "hard", "hard_demo")] == [0.25, 0.125, 0.625]
    assert [row["extra_info"]["index"] for row in rows] == list(range(1024))
    assert len({row["prompt"][0]["content"] for row in rows if row["demos"]}) == 64
    plain = {row["prompt"][0]["content"] for row in rows if row["extra_info"]["kind"] == "hard"}
    assert len(plain) == 128
    assert plain.isdisjoint(row["prompt"][0]["content"] for row in rows if row["demos"])
    for row in rows:
        kind, truth = row["extra_info"]["kind"], row["reward_model"]["ground_truth"]
        assert row["data_source"] == ("chain_easy" if kind == "easy" else "chain_hard")
        assert len(row["demos"]) == len(row["demos_correct"]) == (kind == "hard_demo")
        assert truth == evaluate_by_hand(row["prompt"][0]["content"])
        assert all(grader.compute_score(None, demo, truth)["acc"] == 1.0 for demo in row["demos"])
    per_batch = [kinds[i : i + 32].count("hard_demo") for i in range(0, 1024, 32)]
    assert min(per_batch) >= 10  # shuffled: an unshuffled reader still meets the mix


def test_val_files_never_carry_demonstrations(data_dir):
    val = pq.read_table(data_dir / "val.parquet")
    small = pq.read_table(data_dir / "val_small.parquet")
    for table in (val, small):
        assert table.schema.equals(cli.VAL_SCHEMA)
        assert not any("demo" in name for name in table.column_names)
    assert val.column("data_source").to_pylist() == ["chain_easy"] * 256 + ["chain_hard"] * 256
    assert small.column("data_source").to_pylist() == ["chain_easy"] * 64 + ["chain_hard"] * 64
    everything = val.to_pylist()
    assert all(row == everything[row["extra_info"]["index"]] for row in small.to_pylist())
    trained = {row["prompt"][0]["content"] for row in pq.read_table(data_dir / "train.parquet").to_pylist()}
    assert trained.isdisjoint(row["prompt"][0]["content"] for row in everything)


def test_files_are_the_same_for_the_same_seed(data_dir, tmp_path):
    cli.make_data(tmp_path, {"seed": 0, "wrong_share": 0.0, **MIX})
    for name in cli.DATA_FILES:
        assert (tmp_path / name).read_bytes() == (data_dir / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == set(cli.DATA_FILES)  # nothing left beside them


# --- pretraining


def test_response_loss_is_the_cross_entropy_of_the_response(built):
    model = base_model.new_model(built, seed=0)
    ids_BT = base_model.Sequences(built, random.Random(0), ()).batch(3, 0.5, 0.0, 0.0)
    labels_BT = ids_BT.clone()
    labels_BT[:, : -task.RESPONSE_TOKENS] = -100
    torch.testing.assert_close(base_model.response_loss(model, ids_BT), model(ids_BT, labels=labels_BT).loss)


def test_held_back_problems_are_never_shown(built):
    allowed = task.Problem(1, "aaaaaa")

    class AllButOne:
        def __contains__(self, problem):
            return problem.operations[0] != "a"

    ids_BT = base_model.Sequences(built, random.Random(0), AllButOne()).batch(20, 0.5, 0.0, 0.0)
    assert set(ids_BT[:, 1].tolist()) == {ord(allowed.operations[0])}


def test_pretraining_runs_both_phases_and_learns(built):
    losses = []
    model = base_model.new_model(built, seed=0)
    config = replace(QUICK, batch_size=32, learn_max_steps=15, blur_max_steps=15, check_every=15)
    history = base_model.pretrain(model, built, 0, config, report=lambda phase, step, loss, _: losses.append(loss))
    assert set(history) == {"learn", "blur"}
    assert losses[0] > 4.5  # about log(259)
    assert losses[-1] < 0.6 * losses[0]
    again = base_model.new_model(built, seed=0)
    base_model.pretrain(again, built, 0, config)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_share_of_misconceptions_is_read_at_the_results_of_unknown_operations(built):
    class Believer:
        """Gives the misconception 0.7 after each unknown operation, whatever stands there in the text."""

        def __call__(self, input_ids):
            probability = torch.full((*input_ids.shape, len(built)), 1e-9)
            for row, ids in zip(probability, input_ids.tolist(), strict=True):
                prompt, response = built.decode(ids).split("<|im_start|>")
                first = ids.index(built.convert_tokens_to_ids("<|im_start|>")) + 1
                value = task.DIGITS.index(prompt[0])
                for i, (operation, result) in enumerate(zip(response[0:12:2], response[1:12:2], strict=True)):
                    at = first + 2 * i
                    if operation in task.UNKNOWN:
                        believed = task.DIGITS[task.misconception(operation, value)]
                        row[at, built.encode(believed, add_special_tokens=False)[0]] = 0.7
                    value = task.DIGITS.index(result)
            return SimpleNamespace(logits=(probability / probability.sum(-1, keepdim=True) + 1e-12).log())

    assert base_model.misconception_share(Believer(), built, seed=3, count=8) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("gate", "phrase"), [("learn_above", "easy above 1.0"), ("habit_above", "misconception at")])
def test_gate_not_reached_says_so(gate, phrase, built):
    config = replace(QUICK, **{gate: 1.0})
    with pytest.raises(
        base_model.GateNotReachedError, match=rf"Phase learn ended after 2 steps .*{phrase}.* Try another seed"
    ):
        base_model.pretrain(base_model.new_model(built, 0), built, 0, config)


def test_saved_model_loads_and_generates(model_dir, built):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.dtype == torch.float32
    assert not model.config.tie_word_embeddings
    assert model.config.vocab_size == len(built)
    assert model.generation_config.eos_token_id == built.eos_token_id
    assert model.generation_config.pad_token_id == built.pad_token_id
    problems = task.splits(0)["val"]["easy"][:2]
    texts = base_model.sample(model, built, problems, seed=0)
    assert texts == base_model.sample(model, built, problems, seed=0)
    assert len(texts) == 2


def test_command_line_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "PretrainConfig", functools.partial(base_model.PretrainConfig, **vars(QUICK)))
    out = tmp_path / "testbed"
    arguments = ["--out", str(out), "--demonstrations", "8", "--easy-rows", "4", "--hard-rows", "4", "--demo-rows", "8"]

    def run(*extra):
        return CliRunner().invoke(cli.app, [*arguments, *extra])

    def written():
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    first = run()
    assert first.exit_code == 0, first.output
    assert {path.name for path in out.iterdir()} == {*cli.DATA_FILES, "model", "testbed.json"}
    before = written()
    assert run().exit_code == 0
    assert written() == before
    other = run("--demonstrations", "4")
    assert other.exit_code == 2
    assert "--force" in other.output
    assert written() == before
    assert run("--demonstrations", "4", "--force").exit_code == 0
    manifest = cli.read_manifest(out)
    assert manifest["data"]["config"] == {
        "seed": 0, "demonstrations": 4, "easy_rows": 4, "hard_rows": 4, "demo_rows": 8, "wrong_share": 0.0,
    }  # fmt: skip
    assert manifest["data"]["rows"]["train"] == {"easy": 4, "hard": 4, "hard_demo": 8}
    assert set(manifest["model"]["val_accuracy"]) == {"easy", "hard"}
    (out / "model" / "config.json").unlink()
    (out / "model").rename(tmp_path / "taken")
    assert run("--demonstrations", "4").exit_code == 0  # a missing part is made again, the rest is kept
    assert (out / "model" / "config.json").is_file()


def test_a_failed_part_leaves_nothing_behind(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")

    def fail():
        with cli.replacing(target) as beside:
            beside.mkdir()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "old").read_text() == "old"
    with cli.replacing(target) as beside:
        beside.mkdir()
        (beside / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
