"""Faults inside a run, each injected where it would happen: what the run does, and where it counts it (docs/faults.md).

Every test takes whole training steps through verl's own driver code, see `fake_run`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import resource
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fake_run import LIMIT, PROMPTS, FakeRun, N
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.tracking import FileLogger

from verl_prefix import credit, reward, run_log
from verl_prefix.credit import Credit
from verl_prefix.exceptions import NotFiniteError, RolloutError
from verl_prefix.faults import require_finite
from verl_prefix.grading import pool as pool_module
from verl_prefix.report import rollouts as report_rollouts

ROLLOUTS = PROMPTS * N
NAN, INFINITY = math.nan, math.inf
HANGS = r"\boxed{x=9^{99999999}}"
RIGHT = r"\boxed{1+x}"
TRUTH = {"reward_model": {"ground_truth": ["x+1", "x=1"]}}


@pytest.fixture
def make(monkeypatch, tmp_path):
    """make(*overrides, **of FakeRun) -> FakeRun; its rollout log is in tmp_path / "rollouts"."""
    return partial(FakeRun, monkeypatch, tmp_path / "rollouts")


def logged(run: FakeRun, step: int = 1) -> list[dict]:
    """Lines of the rollout log that are no padding."""
    with open(f"{run.config.trainer.rollout_data_dir}/{step}.jsonl") as file:
        return [line for line in map(json.loads, file) if line["role"] != "padding"]


def test_a_checkpoint_counts_after_its_rollouts_are_logged(make, monkeypatch, tmp_path):
    """A resumed run begins after the checkpoint's step, so what is not in the log by then never will be."""
    run = make()
    seen = []
    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", lambda self: seen.append(len(logged(run))))
    begun = run.trainer._dump_generations
    dumps = []
    monkeypatch.setattr(run.trainer, "_dump_generations", lambda *a, **k: (dumps.append(1), begun(*a, **k)))
    run.step(save=True)
    assert seen == [len(logged(run))] != [0]
    assert len(dumps) == 1  # verl's own call comes later, and finds it done
    run.step()
    assert len(dumps) == 2


def test_what_a_run_has_logged_is_set_aside_before_verl_opens_the_file(make, monkeypatch, tmp_path):
    run = make("trainer.logger=[console,file]")
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    (tmp_path / "metrics.jsonl").write_text("before\n")
    monkeypatch.setattr(PPOTrainer, "fit", lambda self, _: FileLogger("project", "experiment").log({"a": 1}, 3))
    run.trainer.fit(None)
    assert (tmp_path / "metrics.part1.jsonl").read_text() == "before\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 3


@contextlib.contextmanager
def full_disk(bytes_left: int):
    """No file of this process grows beyond `bytes_left`: a write is cut there, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_a_fault_every_count_is_zero(make):
    metrics = make("trainer.logger=[console,file]").step()
    for name in (
        "prefix/missing_rollouts",
        "prefix/evicted_groups",
        "prefix/no_demonstration",
        "prefix/rollout_log_lost",
        "prefix/metrics_log_lost",
        "actor/update_skipped",
    ):
        assert metrics[name] == 0, name


# --- the grader -------------------------------------------------------------------------------------------------------


def hang(monkeypatch):
    pass  # the answer does


def cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")


def talk_nonsense(monkeypatch):
    answers = iter(["ready", "blue"] * 2 * ROLLOUTS)
    monkeypatch.setattr(pool_module, "_read_line", lambda process, allowance: next(answers))


def raise_an_error(monkeypatch):
    def grade(self, response, truth, **_):
        if "9^" in response:
            raise MemoryError("injected")
        return pool_module.Grade(1.0, "correct")

    monkeypatch.setattr(pool_module.GraderPool, "grade", grade)


@pytest.mark.parametrize(
    ("fault", "metric", "share"),
    [
        (hang, "reward/grader_timeout", 1 / ROLLOUTS),
        (raise_an_error, "reward/grader_crash", 1 / ROLLOUTS),
        # all that need algebra: the plain rollouts
        (cannot_start, "reward/grader_crash", PROMPTS * (N - 1) / ROLLOUTS),
        (talk_nonsense, "reward/grader_crash", PROMPTS * (N - 1) / ROLLOUTS),
    ],
)
def test_a_grader_that_fails_costs_the_score_and_is_counted(make, monkeypatch, fault, metric, share):
    monkeypatch.setattr(reward, "_pools", {})
    fault(monkeypatch)
    run = make(score=partial(reward.compute_score, deadline=1.0), rows=(TRUTH, TRUTH))
    hung = []

    def answer(request):
        if request.plain and request.prompt == 0 and not hung:
            hung.append(request)
            return HANGS
        return RIGHT if request.plain else ""

    run.server.answer = answer
    try:
        metrics = run.step()
    finally:
        for pool in reward._pools.values():
            pool.close()
    assert metrics[metric] == pytest.approx(share)
    assert metrics["prefix/missing_rollouts"] == 0
    scores = {line["output"]: line["score"] for line in logged(run) if line["role"] == "on_policy"}
    assert scores[HANGS] == 0
    assert scores[RIGHT] == (1 if share == 1 / ROLLOUTS else 0)
    assert len(logged(run)) == ROLLOUTS
    assert run.workers.updates == 1


@pytest.mark.parametrize("returned", [ValueError("injected"), None, "right", {"acc": 1.0}, {}], ids=repr)
def test_a_reward_function_that_fails_costs_its_rollout_and_is_counted(make, returned):
    """Of any other reward function than the plugin's: verl drops the rollout."""
    run = make("prefix.sampling.rollouts=0", score=lambda solution_str, **_: give(returned if solution_str else 1.0))
    run.server.answer = lambda request: "bad" if request.first else ""
    metrics = run.step()
    assert metrics["prefix/missing_rollouts"] == PROMPTS
    assert len(logged(run)) == ROLLOUTS - PROMPTS
    assert run.workers.updates == 1


def give(returned):
    if isinstance(returned, Exception):
        raise returned
    return returned


# --- the rollout engine -----------------------------------------------------------------------------------------------


def fails(request):
    raise ConnectionError("injected")


@pytest.mark.parametrize("failure", [fails, lambda request: None], ids=["raises", "answers nothing"])
def test_one_failed_request_costs_one_rollout(make, failure):
    run = make("prefix.sampling.rollouts=0")
    run.server.answer = lambda request: failure(request) if request.first and request.prompt == 0 else "0"
    metrics = run.step()
    assert metrics["prefix/missing_rollouts"] == 1
    assert metrics["prefix/evicted_groups"] == 0
    assert all(line["uid"].startswith(f"{line['group']}_{line['session']}_") for line in logged(run))
    groups = [line["row_index"] for line in logged(run)]
    assert (groups.count(0), groups.count(1)) == (N - 1, N)
    assert run.workers.updates == 1
    run.server.answer = lambda request: "0"
    assert run.step()["prefix/missing_rollouts"] == 0


def test_what_is_left_of_a_group_is_its_baseline(make):
    """Rewards 1 1 0 with the fourth rollout lost: the mean is 2/3, not 1/2."""
    run = make("prefix.sampling.rollouts=0", score=lambda solution_str, **_: float(solution_str == "1"))
    answers = iter([None, "1", "1", "0"])
    run.server.answer = lambda request: next(answers) if request.prompt == 0 else "0"
    run.step()
    trained = [row for key, row in run.workers.trained.items() if not key.startswith("pad")]
    found = sorted(float(row["advantages"][0]) for row in trained if row["index"] == 0)
    assert found == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert {float(row["advantages"][0]) for row in trained if row["index"] == 1} == {0.0}
    assert len(run.workers.trained) == ROLLOUTS  # filled up with padding


def test_a_failed_group_is_counted_and_the_others_are_trained_on(make):
    run = make()
    run.server.answer = lambda request: fails(request) if request.prompt == 0 else "0"
    metrics = run.step()
    assert metrics["prefix/missing_rollouts"] == N
    assert metrics["prefix/evicted_groups"] == 1
    assert {line["row_index"] for line in logged(run)} == {1}
    assert run.workers.updates == 1


def test_a_step_without_any_rollout_stops_the_run(make):
    run = make()
    run.server.answer = fails
    with pytest.raises(RolloutError, match=r"step 1: none of its rollouts came back.*Error in _run_prompt"):
        run.step()
    assert run.workers.updates == 0


def test_another_error_of_the_driver_is_left_as_it_is(make, monkeypatch):
    run = make()
    monkeypatch.setattr(run.trainer.replay_buffer, "sample", lambda **_: fails(None))
    with pytest.raises(ConnectionError, match="injected"):
        run.step()


# --- a row ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [None, [], [None], [7], [""], ["0" * LIMIT], ["12<|im_end|>34"], ["12\ud80034"], {"a": "dict"}],
    ids=["null", "none", "a null", "a number", "empty", "too long", "special token", "lone surrogate", "dict"],
)
def test_a_row_whose_demonstration_is_unusable_gets_plain_rollouts_and_is_counted(make, cell):
    run = make(rows=({"demos": cell}, {}))
    metrics = run.step()
    assert metrics["prefix/no_demonstration"] == 1
    assert metrics["prefix/rollout_share"] == 1 / ROLLOUTS
    assert metrics["prefix/missing_rollouts"] == 0
    assert len(run.server.requests) == ROLLOUTS


@pytest.mark.parametrize(
    "override",
    ["prefix.sampling.rollouts=0", "prefix.sampling.until=0", "prefix.demonstrations.demo_ratio=0.0"],
)
def test_a_rollout_that_was_to_have_no_prefix_misses_no_demonstration(make, override):
    run = make(override, rows=({"demos": None}, {"demos": None}))
    assert run.step()["prefix/no_demonstration"] == 0


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_lines_of_the_rollout_log_and_not_the_run(make, tmp_path):
    run = make()
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for step in (1, 2):
        (folder / f"{step}.jsonl").symlink_to("/dev/full")
    with pytest.warns(RuntimeWarning, match=rf"rollout log: {ROLLOUTS} lines of .*1.jsonl are lost .*No space left"):
        assert run.step()["prefix/rollout_log_lost"] == 0  # written after the step's metrics
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*are lost")  # once is enough
        assert run.step()["prefix/rollout_log_lost"] == ROLLOUTS
    assert run.step()["prefix/rollout_log_lost"] == 2 * ROLLOUTS
    run.trainer._shutdown_dump_executor()
    assert [file.name for file in folder.iterdir()] == ["3.jsonl"]
    assert len(logged(run, 3)) == ROLLOUTS
    assert run.workers.updates == 3


def test_the_rollout_log_keeps_the_newest_steps(make, tmp_path):
    run = make("prefix.monitor.rollout_log_steps=2")
    for _ in range(4):
        run.step()
    run.trainer._shutdown_dump_executor()
    assert sorted(file.name for file in (tmp_path / "rollouts").iterdir()) == ["3.jsonl", "4.jsonl"]


def test_a_disk_that_fills_up_again_is_said_again(make, tmp_path):
    run = make()
    (tmp_path / "rollouts").mkdir()
    for step in (1, 3):
        (tmp_path / "rollouts" / f"{step}.jsonl").symlink_to("/dev/full")
    for step in (1, 2, 3):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run.step()
        assert any("are lost" in str(warning.message) for warning in said) == (step != 2)


def test_a_half_written_step_leaves_no_file(make, tmp_path):
    run = make()
    with full_disk(1000), pytest.warns(RuntimeWarning, match="are lost"):
        run.step()
    assert run.step()["prefix/rollout_log_lost"] == ROLLOUTS
    assert report_rollouts.sample(tmp_path / "rollouts", 10**6).unreadable == 0
    assert [file.name for file in (tmp_path / "rollouts").iterdir()] == ["2.jsonl"]


def test_a_log_folder_that_cannot_be_made_costs_the_lines(make, tmp_path):
    run = make()
    (tmp_path / "rollouts").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="are lost"):
        run.step()
    assert run.trainer._lost_rollouts.count == ROLLOUTS


def test_a_full_disk_costs_whole_lines_of_the_metrics_and_not_the_run(make, tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(file))
    run = make("trainer.logger=[console,file]")
    logger = FileLogger("project", "experiment")
    run.trainer.logger = SimpleNamespace(logger={"file": logger})
    run.trainer.on_train_begin()
    logger.log({"a": 1.0}, 1)
    with full_disk(os.path.getsize(file) + 10), pytest.warns(RuntimeWarning, match="metrics: 1 lines of .* are lost"):
        logger.log({"a": 2.0}, 2)
    with full_disk(os.path.getsize(file)):  # not a byte
        logger.log({"a": 3.0}, 3)
    logger.log({"a": 4.0}, 4)
    assert run.step()["prefix/metrics_log_lost"] == 2
    logger.finish()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 4]


def test_readers_go_past_a_torn_line(tmp_path):
    """As a killed run leaves it at the end, or an earlier version of the plugin in the middle."""
    lines = ['{"step": 1, "data": {"a": 1.0}}', '{"step": 2, "da', '{"step": 3, "data": {"a": 3.0}}', '{"step": 4']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert run_log.series(tmp_path / "metrics.jsonl", "a") == [(1, 1.0), (3, 3.0)]
    (tmp_path / "1.jsonl").write_text('{"input": "p", "output": "a", "score": 1.0}\n{"input": "p", "outp')
    sample = report_rollouts.sample(tmp_path, 10**6)
    assert (sample.rollouts_read, sample.unreadable) == (1, 1)


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["prefix_rft", "grpo", "hpt", "adaptive"])
@pytest.mark.parametrize("value", [NAN, -INFINITY], ids=str)
def test_a_reward_that_is_not_finite_stops_the_run(make, preset, value):
    """Also where a gate would drop the rollout."""
    run = make(preset=preset, score=lambda solution_str, **_: value if solution_str.endswith("bad") else 0.0)
    run.server.answer = lambda request: "bad" if request.prompt == 0 else "0"
    with pytest.raises(NotFiniteError, match=r"step 1: rewards .* of \d rollouts \(.*the reward function") as caught:
        run.step()
    assert len(caught.value.bad) == sum(request.prompt == 0 for request in run.server.requests)
    assert run.workers.updates == 0
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("watched", [True, False])
def test_a_log_probability_of_the_training_engine_that_is_not_finite_stops_the_run(make, value, watched):
    run = make(f"actor_rollout_ref.rollout.calculate_log_probs={watched}")
    run.workers.log_prob = value
    with pytest.raises(NotFiniteError, match=r"step 1: old_log_probs .* 1 values of 1 rollouts"):
        run.step()
    assert run.workers.updates == 0


def test_a_log_probability_of_the_rollout_engine_that_is_not_finite_stops_the_run(make):
    run = make()
    run.server.log_prob = NAN
    with pytest.raises(NotFiniteError, match=rf"step 1: rollout_log_probs .* of {ROLLOUTS} rollouts .*, \.\.\.\)"):
        run.step()
    assert run.workers.updates == 0


@pytest.mark.parametrize("preset", ["prefix_rft", "srft"])
def test_an_entropy_that_is_not_finite_stops_a_run_that_reads_it(make, preset):
    run = make(preset=preset)
    run.workers.entropy = NAN
    with pytest.raises(NotFiniteError, match=r"step 1: entropy .* 1 values of 1 rollouts"):
        run.step()
    assert run.workers.updates == 0


@pytest.mark.parametrize("given", [("prefix.entropy_clip.keep=all",), ("prefix.sampling.rollouts=0",)], ids=str)
def test_an_entropy_that_is_only_a_metric_is_shown_as_it_is(make, given):
    run = make(*given)
    run.workers.entropy = NAN
    assert math.isnan(run.step()["actor/entropy"])
    assert run.workers.updates == 1


def test_advantages_that_are_not_finite_stop_the_run(make, monkeypatch):
    def broken(estimator, *, token_level_rewards, **_):
        advantages = token_level_rewards / token_level_rewards.sum()
        return Credit(advantages, advantages, torch.zeros(0, dtype=torch.bool))

    run = make(score=lambda **_: 0.0)
    monkeypatch.setattr(credit, "assign", broken)
    with pytest.raises(NotFiniteError, match=rf"step 1: advantages .* of {ROLLOUTS} rollouts .*estimator"):
        run.step()
    assert run.workers.updates == 0


@pytest.mark.parametrize("factor", [NAN, INFINITY], ids=str)
def test_a_loss_that_is_not_finite_changes_no_weight_and_is_counted(make, factor):
    run = make()
    before = run.workers.module.weight.detach().clone()
    run.workers.loss = factor
    with pytest.warns(RuntimeWarning, match=r"step 1: actor/grad_norm is (nan|inf) .*update was skipped"):
        metrics = run.step()
    assert metrics["actor/update_skipped"] == 1
    assert run.workers.module.weight.equal(before)
    run.workers.loss = 1.0
    assert run.step()["actor/update_skipped"] == 0
    assert not run.workers.module.weight.equal(before)


def test_a_large_finite_value_is_no_fault():
    largest = torch.finfo(torch.float32).max
    require_finite(1, ["a", "b"], rewards=torch.tensor([largest, largest]))
    with pytest.raises(NotFiniteError, match=r"1 values of 1 rollouts \(b\)"):
        require_finite(1, ["a", "b"], rewards=torch.tensor([[INFINITY, 1.0], [1.0, 1.0]]).flip(0))


def test_a_metric_that_was_not_finite_is_no_point_of_a_curve(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    logger = FileLogger("project", "experiment")
    for step, value in ((1, 0.5), (2, NAN), (3, INFINITY), (4, 0.25)):
        logger.log({"actor/entropy": value, "prefix/low": 0.5}, step)
    logger.finish()
    assert run_log.series(tmp_path / "metrics.jsonl", "actor/entropy") == [(1, 0.5), (4, 0.25)]
    assert len(run_log.series(tmp_path / "metrics.jsonl", "prefix/low")) == 4
