"""`prefix_colocate_async`, one process: prompts are trained on steps after they were issued."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fake_run import PROMPTS, FakeRun, N

from verl_prefix.config import PrefixConfig
from verl_prefix.exceptions import RolloutError
from verl_prefix.sampling import draw_prefix

ASYNC = "trainer.v1.trainer_mode=prefix_colocate_async"


@pytest.fixture
def make(monkeypatch, tmp_path):
    def make(*overrides, **kwargs):
        # verl asks for single prompts in this mode
        run = FakeRun(monkeypatch, tmp_path / "rollouts", ASYNC, "data.gen_batch_size=1", *overrides, **kwargs)
        run.trainer.logger = SimpleNamespace(logger={})
        return run

    return make


def logged(folder, step):
    return [json.loads(line) for line in (folder / f"{step}.jsonl").read_text().splitlines()]


def test_prefixes_are_those_of_the_step_at_which_a_prompt_was_issued(make, tmp_path):
    schedule = {"steps": 4}
    run = make(*(f"prefix.schedule.{name}={value}" for name, value in schedule.items()))
    run.trainer.on_train_begin()  # one batch ahead
    for step in range(1, 5):
        run.step()
        prefixed = [line for line in logged(tmp_path / "rollouts", step) if line["role"] == "prefixed"]
        assert len(prefixed) == PROMPTS
        issued = max(step - 1, 1)
        for line in prefixed:
            draw = draw_prefix(
                PrefixConfig.of({"schedule": schedule}),
                step=issued,
                row_index=line["row_index"],
                session_id=line["session"],
                demo_lens=[line["demo_len"]],
            )
            assert line["prefix_ratio"] == pytest.approx(draw.ratio)
            assert line["prefix_len"] == draw.prefix_len


def test_the_group_is_the_baseline_whatever_the_step_it_was_issued_at(make):
    run = make(score=lambda solution_str, **_: float(solution_str.startswith("1")))
    run.trainer.on_train_begin()
    for _ in range(3):
        run.server.answer = lambda request: "1" if request.plain else ""
        run.step()
        assert len(run.workers.trained) == PROMPTS * N
        for key, row in run.workers.trained.items():
            own = row["advantages"][row["response_mask"] > 0]
            group = [r for k, r in run.workers.trained.items() if k.split("_")[0] == key.split("_")[0]]
            mean = sum(float(r["rm_scores"].sum()) for r in group) / N
            assert float(own[-1]) == pytest.approx(float(row["rm_scores"].sum()) - mean, abs=1e-6)


def test_where_no_rollout_comes_back_the_run_stops(make):
    """verl's own buffer asks for new prompts for ever."""
    run = make()
    run.server.answer = lambda request: 1 / 0
    with pytest.raises(RolloutError, match=r"step 1: 6[5-9] prompts were issued .* 'Error in _run_prompt'"):
        run.step()


def test_a_prompt_of_which_one_rollout_failed_is_replaced(make):
    run = make()
    failures = iter([True])
    run.server.answer = lambda request: 1 / 0 if next(failures, False) else "0"
    metrics = run.step()
    assert metrics["training/rollout_failure/evicted_samples"] == 1
    assert len(run.workers.trained) == PROMPTS * N
    groups = [key.split("_")[0] for key in run.workers.trained]
    assert sorted(map(groups.count, set(groups))) == [N] * PROMPTS


def test_rollouts_without_log_probs(make):
    """verl's asynchronous client answers an empty list in that case."""
    run = make("actor_rollout_ref.rollout.calculate_log_probs=false")
    generate = run.server.generate

    async def without(**request):
        answer = await generate(**request)
        answer.log_probs = []
        return answer

    run.server.generate = without
    run.step()
    assert all("rollout_log_probs" not in row for row in run.workers.trained.values())


def test_a_row_that_is_in_a_batch_twice_moves_its_interval_by_each_group(make, tmp_path):
    """Which can happen where the batch spans two epochs."""
    run = make(
        preset="adaptive",
        rows=({"index": 5}, {"index": 5}),
        score=lambda solution_str, **_: float(solution_str.endswith("a")),
    )
    moved = []
    run.trainer._intervals.update = moved.extend
    run.server.answer = lambda request: "a" if request.prompt == 0 else "k"
    run.step()
    lines = logged(tmp_path / "rollouts", 1)
    expected = {}
    for line in lines:
        expected.setdefault(line["group"], []).append((line["prefix_ratio"], line["score"]))
    assert len(expected) == 2
    assert {score for pairs in expected.values() for _, score in pairs} == {0.0, 1.0}
    means = [sum(score for _, score in pairs) / N for pairs in expected.values()]
    assert sorted(mean for _, _, mean in moved) == pytest.approx(sorted(means))
    ratios = {ratio for pairs in expected.values() for ratio, _ in pairs}
    assert all(row == 5 and any(ratio == pytest.approx(r) for r in ratios) for row, ratio, _ in moved)
