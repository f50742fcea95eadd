"""`verl-prefix compare`: what a run reached and cost, and seeds taken together."""

from __future__ import annotations

import json

import pytest
from report_runs import write_run
from typer.testing import CliRunner

from verl_prefix import comparison
from verl_prefix.cli import app
from verl_prefix.exceptions import RunFolderError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return [
        write_run(out / "prefix_rft_seed1", seed=1, best=0.6, logged=0),
        write_run(out / "prefix_rft_seed2", seed=2, best=0.8, logged=0),
        write_run(out / "stock_grpo_seed1", seed=1, best=0.2, logged=0, prefixes=False),
    ]


def hard(folders):
    return [r for run in comparison.find_runs(folders) for r in comparison.results(run) if r.source == "hard"]


def test_a_run_by_hand(folders):
    found = hard(folders)[0]
    assert (found.run, found.method, found.seed) == ("prefix_rft_seed1", "prefix_rft", 1)
    assert (found.first, found.last, found.best, found.best_step) == (0.0, 0.6, 0.6, 20)
    assert found.area == pytest.approx(0.3)  # a straight line from 0 to 0.6
    assert found.steps == 20
    assert found.updates == 20 * 2  # 32 prompts in mini-batches of 16
    assert found.generated_tokens == pytest.approx(20 * 128 * 25 * 0.9)  # a tenth are prefix tokens
    assert found.hours == pytest.approx(20 * 3.6 / 3600)


def test_area_weighs_by_steps():
    assert comparison.area([(0, 0.0), (10, 1.0), (30, 1.0)]) == pytest.approx((10 * 0.5 + 20 * 1.0) / 30)
    assert comparison.area([(7, 0.25)]) == 0.25


def test_seeds_of_a_method_are_taken_together(folders):
    prefix_rft, stock = comparison.over_seeds(hard(folders))
    assert prefix_rft["seeds"] == [1, 2]
    assert prefix_rft["last"] == pytest.approx({"mean": 0.7, "min": 0.6, "max": 0.8})
    assert stock["seeds"] == [1]
    assert stock["last"]["mean"] == pytest.approx(0.2)


def test_updates_are_unknown_without_the_configuration(tmp_path):
    run = write_run(tmp_path / "a", logged=0)
    (run / "hydra" / ".hydra" / "config.yaml").unlink()
    found = comparison.results(comparison.find_runs([run])[0])
    assert found[0].updates is None
    assert comparison.over_seeds(found)[0]["updates"] is None


@pytest.mark.parametrize(
    ("name", "method", "seed"),
    [
        ("luffy_seed12", "luffy", 12),
        ("luffy", "luffy", None),
        ("x_seed", "x_seed", None),
        ("a_seed1_b", "a_seed1_b", None),
    ],
)
def test_method_and_seed_from_the_name(tmp_path, name, method, seed):
    (found,) = comparison.find_runs([write_run(tmp_path / name, steps=5, logged=0)])
    assert (found.method, found.seed) == (method, seed)


def test_equal_names_are_told_apart_and_not_averaged(tmp_path):
    folders = [write_run(tmp_path / sub / "luffy_seed1", steps=5, logged=0) for sub in ("old", "new")]
    found = comparison.find_runs(folders)
    assert [run.name for run in found] == ["old/luffy_seed1", "new/luffy_seed1"]
    assert [run.method for run in found] == ["old/luffy", "new/luffy"]


def test_errors_name_folder_and_mend(tmp_path):
    run = write_run(tmp_path / "a", steps=5, logged=0)
    with pytest.raises(RunFolderError, match="given twice"):
        comparison.find_runs([run, run])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match=r"empty: no metrics.jsonl.*VERL_FILE_LOGGER_PATH"):
        comparison.find_runs([tmp_path / "empty"])
    (run / "hydra" / ".hydra" / "config.yaml").write_text("a: [")
    with pytest.raises(RunFolderError, match="config.yaml"):
        comparison.results(comparison.find_runs([run])[0])


def test_a_runs_rl_phase_stands_for_it(folders, tmp_path):
    for run in folders[:2]:
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "rl").symlink_to(run)
        (tmp_path / run.name / "sft").mkdir()
    expected = comparison.over_seeds(hard(folders[:2]))
    assert comparison.over_seeds(hard([tmp_path / run.name for run in folders[:2]])) == expected


def test_the_table(folders):
    done = CliRunner().invoke(app, ["compare", *map(str, folders)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["prefix_rft_seed2", "hard", "0.00", "0.80", "0.80", "20", "0.40", "20", "40", "0.06", "0.02"] in lines
    label, costs = ["prefix_rft,", "2", "seeds:"], ["20", "40", "0.06", "0.02"]
    assert [*label, "mean", "hard", "0.00", "0.70", "0.70", "0.35", *costs] in lines
    assert [*label, "range", "hard", "0.00", "0.60-0.80", "0.60-0.80", "0.30-0.40", *costs] in lines
    assert not any(line[:2] == ["stock_grpo,", "1"] for line in lines)


def test_json_is_all_of_stdout(folders):
    done = CliRunner().invoke(app, ["compare", "--json", *map(str, folders)])
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 6
    assert {(entry["method"], entry["source"]) for entry in found["methods"]} == {
        (method, source) for method in ("prefix_rft", "stock_grpo") for source in ("easy", "hard")
    }


def test_a_picture_and_a_run_without_validation(folders, tmp_path):
    silent = write_run(tmp_path / "silent", steps=4, every=100, logged=0)
    (silent / "metrics.jsonl").write_text('{"step": 1, "data": {"actor/grad_norm": 1.0}}\n')
    picture = tmp_path / "new" / "curves.png"
    done = CliRunner().invoke(app, ["compare", str(silent), str(folders[0]), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert "No validation logged yet: silent" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_hostile_names_stay_text(tmp_path):
    source = "[red]hard\x1b[2J"
    run = write_run(tmp_path / "a", steps=5, logged=0)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "data": {f"val-core/{source}/acc/mean@1": 0.5}}) + "\n")
    done = CliRunner().invoke(app, ["compare", str(run)], env={"COLUMNS": "160"})
    assert "[red]hard\\x1b[2J" in done.stdout
