"""Reading metrics: complete lines only, and the segments of a resumed run as one."""

from __future__ import annotations

import json

import pytest

from verl_prefix import run_log


def write(file, entries, tail=""):
    file.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in entries) + tail)


def test_a_line_still_being_written_is_left(tmp_path):
    write(tmp_path / "metrics.jsonl", [(1, {"a": 1.0})], tail='{"step": 2, "da')
    assert list(run_log.steps(tmp_path / "metrics.jsonl")) == [(1, {"a": 1.0})]


def test_text_with_line_ends_of_its_own_is_one_line(tmp_path):
    entry = {"step": 1, "data": {"val-core/a\u2028b/acc/mean@1": 0.5}}
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    assert list(run_log.steps(tmp_path / "metrics.jsonl")) == [(1, entry["data"])]


@pytest.mark.parametrize("name", ["qwen2.5.jsonl", "metrics", "a[1].jsonl"])
def test_a_file_is_set_aside_as_the_next_segment(tmp_path, name):
    file = tmp_path / name
    run_log.set_aside(file)
    write(file, [])
    run_log.set_aside(file)  # nothing in it
    for step in range(1, 12):
        write(file, [(step, {"a": float(step)})])
        run_log.set_aside(file)
    assert not file.exists()
    assert len(list(tmp_path.iterdir())) == 11
    write(file.with_name(f"{file.stem}.part12.more{file.suffix}"), [(99, {})])  # another run's
    write(file, [(12, {"a": 12.0})])
    assert [step for step, _ in run_log.steps(file)] == list(range(1, 13))


@pytest.mark.parametrize(
    "variables", [{}, {"VERL_FILE_LOGGER_ROOT": "logs"}, {"VERL_FILE_LOGGER_PATH": "logs/m.jsonl"}]
)
def test_the_file_is_verls(tmp_path, monkeypatch, variables):
    from verl.utils.tracking import FileLogger

    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    for name in ("VERL_FILE_LOGGER_ROOT", "VERL_FILE_LOGGER_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger = FileLogger("project", "a.run")
    logger.finish()
    assert run_log.file_of("project", "a.run").samefile(logger.filepath)


def test_no_file_yet(tmp_path):
    assert list(run_log.steps(tmp_path / "metrics.jsonl")) == []


def test_segments_of_a_resumed_run_are_one_curve(tmp_path):
    write(tmp_path / "metrics.part1.jsonl", [(s, {"x": s / 10, "y": 0.0}) for s in range(6)])
    # resumed at the checkpoint of step 3, validated there, killed in step 5
    write(tmp_path / "metrics.part2.jsonl", [(3, {"val-core/easy/acc/mean@1": 0.5}), (4, {"x": 40.0})])
    write(tmp_path / "metrics.jsonl", [(4, {"x": 400.0}), (5, {"x": 500.0})])
    assert run_log.series(tmp_path / "metrics.jsonl", "x") == [(0, 0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 400), (5, 500)]
    assert run_log.accuracies(tmp_path / "metrics.jsonl") == {"easy": [(3, 0.5)]}


def test_more_than_nine_segments_stay_in_order(tmp_path):
    for n in range(1, 12):
        write(tmp_path / f"metrics.part{n}.jsonl", [(n, {"x": float(n)})])
    write(tmp_path / "metrics.jsonl", [(12, {"x": 12.0})])
    assert run_log.series(tmp_path / "metrics.jsonl", "x") == [(n, float(n)) for n in range(1, 13)]


STOCK = {"response_length/mean": 20.0, "prompt_length/mean": 5.0, "perf/total_num_tokens": 250.0}


def test_generated_tokens_of_stock_verl_are_its_responses(tmp_path):
    write(tmp_path / "metrics.jsonl", [(0, {}), (1, STOCK), (2, STOCK)])
    assert run_log.generated_tokens(tmp_path / "metrics.jsonl") == pytest.approx(400)


def test_tokens_of_rollouts_that_a_gate_dropped_were_generated_too(tmp_path):
    own = {"prefix/generated_tokens": 120.0, "gate/dropped_tokens": 30.0}
    write(tmp_path / "metrics.jsonl", [(1, STOCK | own)])  # verl's total has padding in it
    assert run_log.generated_tokens(tmp_path / "metrics.jsonl") == 150
