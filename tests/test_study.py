"""The study: the stand-in's batch, the choice of settings, runs that resume, and what a result holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tests_support import PRESETS, compose_in_process

from benchmarks.study import run, tune
from verl_prefix.config import PrefixConfig

PAGE = Path(run.ROOT) / "docs/comparison.md"
README = Path(run.ROOT) / "README.md"
RESULTS = Path(run.ROOT) / "benchmarks/study/results"


@pytest.fixture(scope="module")
def small_testbed(tmp_path_factory):
    """Data and an untrained model: enough for what is not about learning."""
    from data_prep.testbed import base_model
    from data_prep.testbed.__main__ import make_data

    folder = tmp_path_factory.mktemp("testbed")
    make_data(
        folder,
        {"seed": 5, "demonstrations": 8, "easy_rows": 16, "hard_rows": 16, "demo_rows": 32, "wrong_share": 0.0},
    )
    tokenizer = base_model.build_tokenizer()
    base_model.save(base_model.new_model(tokenizer, 5), tokenizer, folder / "model")
    return folder


def standin(testbed, **kwargs):
    from benchmarks.study.standin import StandIn

    return StandIn(testbed, 5, 1e-3, **kwargs)


def composed(preset, *overrides):
    return compose_in_process(
        f"+prefix={preset}", "data.max_response_length=32", "actor_rollout_ref.rollout.n=4", *overrides
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_standin_takes_every_preset(small_testbed, preset):
    made = standin(small_testbed)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.rl(composed(preset), 1)
    assert made.curve.steps == [0, 1]
    config = PrefixConfig.of(composed(preset).prefix)
    # an untrained policy solves nothing: only demonstration terms and entropy bonus can move it
    fixed = config.sft.weight.initial == 0 and (not config.loss.update_prefix or config.sampling.rollouts == 0)
    fixed = fixed and composed(preset).actor_rollout_ref.actor.entropy_coeff == 0
    moved = any((p != before[name]).any() for name, p in made.model.named_parameters())
    assert moved or fixed


def test_standin_rollouts_begin_with_the_demonstration(small_testbed):
    import torch

    from verl_prefix.adaptive import Intervals
    from verl_prefix.demonstrations import DemonstrationTokenizer

    made, config = standin(small_testbed), composed("prefix_rft")
    rows = made._draw(16)
    demonstrations = DemonstrationTokenizer(made.tokenizer, 32)
    prefix = PrefixConfig.of(config.prefix)
    batch = made._rollout(rows, config, prefix, demonstrations, Intervals(0.5), 1)
    prefixed = batch["rows"]["prefix_len"].nonzero().flatten().tolist()
    assert len(prefixed) == sum(bool(row["demos"]) for row in rows)
    for i in prefixed:
        length = int(batch["rows"]["prefix_len"][i])
        assert batch["response"][i, :length].tolist() == made._ids(rows[i // 4]["demos"][0])[:length]
    own = batch["mask"].sum() - batch["rows"]["prefix_len"].sum()
    assert made.generated == int(own)
    assert isinstance(batch["mask"], torch.Tensor)


def entry(method, lr, knob, seed, hard):
    return {"method": method, "lr": lr, "knob": knob, "seed": seed, "curve": {"easy": [0, 1, 1], "hard": [0, 0, hard]}}


def test_a_setting_is_chosen_over_both_seeds_and_two_checks():
    entries = [entry("a", 1, 0, 101, 0.8), entry("a", 1, 0, 102, 0.2), entry("a", 2, 0, 101, 0.6)]
    entries += [entry("a", 2, 0, 102, 0.6), entry("a", 3, 0, 101, 1.0), entry("b", 1, 0, 101, 1.0)]
    ranked = tune.mean_scores(entries, "a")
    assert [setting["lr"] for _, _, setting in ranked] == [2, 1, 3]
    assert ranked[0][0] == pytest.approx((1 + 0.6 / 2) / 2)


def test_every_method_of_the_grid_gets_the_same_effort():
    grid = yaml.safe_load(tune.GRID.read_text())
    assert {len(tune.points(grid, method)) for method in grid["methods"]} == {9}


def test_methods_compose_on_stock_verl():
    table = yaml.safe_load(run.METHODS.read_text())
    made = set()
    for name, spec in table["methods"].items():
        assert "preset" in spec or "sft_steps" in spec, name
        if "preset" in spec:
            made.add((f"+prefix={spec['preset']}", *spec.get("overrides", [])))
    for overrides in made:
        compose_in_process(*overrides)


def study(tmp_path, **spec):
    return run.Study(tmp_path, "grpo", 3, {"preset": "grpo", "lr": 1e-3, **spec}, 50, 8)


def test_a_shortened_run_keeps_both_of_its_phases(tmp_path):
    assert study(tmp_path, sft_steps=30).rl_steps == 20
    with pytest.raises(typer.BadParameter, match="--steps 50 leave none of RL"):
        study(tmp_path, sft_steps=50)


def test_of_sft_the_end_is_verls_validation(tmp_path, monkeypatch):
    made = run.Study(tmp_path, "sft", 3, {"sft_lr": 1e-3}, 50, 8)
    called = []
    monkeypatch.setattr(run, "_call", lambda command, **_: called.append(command))
    made.train()
    assert [command[1] for command in called] == ["recipes/sft_cpu.sh", "recipes/evaluate_cpu.sh"]
    ends = [{"updates": u, "tokens": 0, "seconds": 2.0 * u, "easy": 0, "hard": 0, "by": "plain"} for u in (0, 50)]
    monkeypatch.setattr(made, "_sft_points", lambda: list(ends))
    (made.folder / "rl").mkdir(parents=True)
    right = {"val-core/chain_easy/acc/mean@1": 0.5, "val-core/chain_hard/acc/mean@1": 0.25}
    (made.folder / "rl/metrics.jsonl").write_text(json.dumps({"step": 0, "data": right}) + "\n")
    first, last = made.curve()
    assert first == ends[0]
    assert last == {**ends[1], "seconds": 100.0, "easy": 0.5, "hard": 0.25, "by": "verl validation"}


def _setting(spec, knob):
    """(learning rate, knob) of a method of the comparison, as the grid has them."""
    overrides = dict(override.split("=") for override in spec.get("overrides", []))
    if "preset" not in spec:
        return spec["sft_lr"], 0
    if knob == "sft_steps":
        return spec["lr"], spec["sft_steps"]
    if knob not in overrides:  # the preset's own
        composed = compose_in_process(f"+prefix={spec['preset']}")
        return spec["lr"], OmegaConf.select(composed, knob)
    return spec["lr"], yaml.safe_load(overrides[knob])


def test_methods_run_at_the_settings_that_tuning_chose():
    grid, methods = yaml.safe_load(tune.GRID.read_text()), yaml.safe_load(run.METHODS.read_text())["methods"]
    entries = tune.read(run.METHODS.with_name("tuning.jsonl"))
    for method, spec in grid["methods"].items():
        points = {tune.key(entry)[1:3] for entry in entries if entry["method"] == method}
        assert len(points) == 9, method
        _, seeds, chosen = tune.mean_scores(entries, method)[0]
        assert seeds == 2
        assert _setting(methods[method], spec["knob"]) == (chosen["lr"], chosen["knob"]), method


def test_points_of_a_curve_add_up_tokens_and_seconds_of_both_phases(tmp_path, monkeypatch):
    made = study(tmp_path, sft_steps=25)
    monkeypatch.setattr(
        made,
        "_sft_points",
        lambda: [{"updates": u, "tokens": 0, "seconds": 2.0 * u, "easy": 0, "hard": 0} for u in (0, 25)],
    )
    step = {
        "response_length/mean": 20.0,
        "prompt_length/mean": 5.0,
        "perf/total_num_tokens": 250.0,
        "timing_s/step": 3.0,
    }
    right = {"val-core/chain_easy/acc/mean@1": 0.5, "val-core/chain_hard/acc/mean@1": 0.25}
    lines = [(0, right), (1, step), (2, step | right)]
    (made.folder / "rl").mkdir(parents=True)
    file = made.folder / "rl" / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s, "data": d}) + "\n" for s, d in lines))
    got = [(p["updates"], p["tokens"], p["seconds"], p["easy"], p["hard"]) for p in made.curve()]
    assert got == [(0, 0, 0.0, 0, 0), (25, 0, 50.0, 0.5, 0.25), (27, 400, 56.0, 0.5, 0.25)]


def test_a_folder_of_other_settings_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_call", lambda *args, **kwargs: None)
    study(tmp_path).prepare()
    (tmp_path / "runs/grpo_seed3/kept").write_text("x")
    study(tmp_path).prepare()
    assert (tmp_path / "runs/grpo_seed3/kept").exists()
    study(tmp_path, overrides=["prefix.seed=1"]).prepare()
    assert not (tmp_path / "runs/grpo_seed3/kept").exists()
    assert (tmp_path / "runs/old1_grpo_seed3/kept").exists()


def test_data_of_its_own_lies_apart(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(run, "_call", lambda command, **kwargs: called.append(list(map(str, command))))
    plain, wrong = study(tmp_path), study(tmp_path, testbed={"wrong_share": 0.25})
    wrong.prepare()
    assert called[0][-1] == "--wrong-share=0.25"
    assert str(wrong.testbed) == called[0][called[0].index("--out") + 1] != str(plain.testbed)
    (parsed,) = OverridesParser.create().parse_overrides([f"data.train_files={wrong.testbed}/train.parquet"])
    assert parsed.value() == f"{wrong.testbed}/train.parquet"


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    def never(self):
        raise AssertionError("trained again")

    monkeypatch.setattr(run.Study, "train", never)
    table = yaml.safe_load(run.METHODS.read_text())
    done = run.Study(tmp_path, "grpo", 3, table["methods"]["grpo"], table["steps"], table["rollouts"])
    (tmp_path / "results").mkdir()
    target = tmp_path / "results/grpo_seed3.json"
    target.write_text(json.dumps({"settings": done.settings}))
    result = CliRunner().invoke(run.app, ["grpo", "3", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "done" in result.output
    target.write_text(json.dumps({"settings": {"preset": "luffy"}}))
    assert CliRunner().invoke(run.app, ["grpo", "3", "--out", str(tmp_path)]).exit_code == 2
    assert CliRunner().invoke(run.app, ["grpi", "3", "--out", str(tmp_path)]).exit_code == 2


def point(updates, tokens, hard):
    return {"updates": updates, "tokens": tokens, "seconds": 60.0 * updates, "easy": 1.0, "hard": hard, "by": "test"}


def result(method, seed, *points):
    return {"method": method, "seed": seed, "settings": {}, "curve": list(points)}


def test_methods_are_compared_at_the_end_and_at_equal_tokens(tmp_path):
    from benchmarks.study import results

    runs = [
        result("a", 1, point(0, 0, 0.0), point(10, 1000, 0.4)),
        result("a", 2, point(0, 0, 0.0), point(10, 2000, 0.8)),
        result("sft", 1, point(0, 0, 0.0), point(10, 0, 0.5)),
    ]
    assert results.budget(runs) == 1000
    first, second = results.rows(runs, 1000)
    assert (first["method"], first["hard"], first["hard_range"]) == ("a", pytest.approx(0.6), (0.4, 0.8))
    assert first["hard_at"] == pytest.approx((0.4 + 0.4) / 2)  # the second run was half way
    assert (second["hard"], second["hard_at"]) == (0.5, 0.5)
    assert "| `a` | 2 | 1.00 | 0.60 (0.40-0.80) | 10 | 0.00 M | 10.0 | 1.00, 0.40 |" in results.markdown(runs)
    results.picture(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_every_method_of_a_table_has_settings_and_every_setting_has_a_table():
    from benchmarks.study import results

    table = yaml.safe_load(run.METHODS.read_text())
    named = {method for methods in table["tables"].values() for method in methods}
    assert set(table["methods"]) == named
    assert set(table["tables"]) | set(results.SEARCHES) == set(re.findall(r"<!-- table (\w+) -->", PAGE.read_text()))


def test_a_table_has_its_first_method_on_the_seeds_of_the_others():
    from benchmarks.study import results

    runs = [result("prefix_rft", s, point(0, 0, 0.0), point(10, 1000, hard)) for s, hard in ((1, 0.8), (2, 0.3))]
    other = result("frozen", 2, point(0, 0, 0.0), point(10, 1000, 0.4))
    assert results.of_table([*runs, other, result("grpo", 1)], "ablations") == [runs[1], other]
    assert results.of_table(runs, "ablations") == runs
    page = "before\n<!-- table ablations -->\nold\n<!-- end of table -->\nafter\n"
    both = [result("uniform", seed, point(0, 0, 0.0), point(10, 1000, 0.5)) for seed in (1, 2)]
    filled = results.fill(page, [*runs, other, *both, result("top50", 3, point(10, 1000, 0.6))])
    assert "| `uniform` | 2 | 1.00 | 0.50 (0.50-0.50) | 0.55 |" in filled
    assert "| `top50` | 1 | 1.00 | 0.60 | – |" in filled  # `prefix_rft` has no run on seed 3
    filled = results.fill(page, [*runs, other])
    assert "old" not in filled
    assert "| `frozen` | 1 | 1.00 | 0.40 | 0.30 | 10 |" in filled  # 0.30: `prefix_rft` on seed 2
    assert results.fill(filled, [*runs, other]) == filled


def test_tokens_until_the_mean_of_the_seeds_reaches_a_goal():
    from benchmarks.study import results

    runs = [result("prefix_rft", seed, point(0, 0, 0.0), point(10, 1000, hard)) for seed, hard in ((1, 0.9), (2, 0.7))]
    assert results.tokens_until(runs, 0.7) == pytest.approx(875, abs=1)
    assert results.tokens_until(runs, 0.99) == 1000
    page = results.fill("<!-- table fewer_tokens -->\n<!-- end of table -->\n", runs)
    assert "easy, hard at 0.00 M tokens" in page
    assert "1.00, 0.70 |" in page


@pytest.mark.parametrize("page", [PAGE, README], ids=lambda file: file.name)
def test_the_pages_tables_are_those_of_the_results(page):
    from benchmarks.study import results

    assert "<!-- table comparison -->" in page.read_text()
    assert results.fill(page.read_text(), run.read_results(RESULTS)) == page.read_text(), (
        f"python -m benchmarks.study.results benchmarks/study/results --page {page.relative_to(README.parent)}"
    )


def test_candidates_are_compared_at_the_tokens_that_the_published_setting_needs():
    from rich.console import Console

    from benchmarks.study import explore

    def entry(name, seed, *hard):
        curve = {"tokens": [0, 1000, 2000], "hard": list(hard), "easy": [0.0, 0.5, 1.0]}
        return {"name": name, "seed": seed, "lr": 1e-3, "steps": 125, "overrides": ["a=1"], "curve": curve}

    entries = [
        entry("published", 1, 0.0, 0.6, 0.8),
        entry("published", 2, 0.0, 0.8, 1.0),
        entry("other", 1, 0.0, 0.5, 0.9),
    ]
    assert explore.budget(entries) == pytest.approx(1000, abs=3)
    assert explore.at(entries[2], "hard", 1500) == pytest.approx(0.7)
    console = Console(width=200, record=True)
    console.print(explore.table(entries).rich())
    lines = console.export_text().splitlines()
    assert any("published" in line and "0.70" in line and "1: 0.60, 2: 0.80" in line for line in lines)
    with pytest.raises(Exception, match="more steps"):
        explore.budget([entry("published", 1, 0.0, 0.1, 0.2)])


def test_candidates_that_were_run_are_those_of_the_file():
    from benchmarks.study import explore

    candidates = yaml.safe_load((explore.FOLDER / "candidates.yaml").read_text())
    done = explore.read(explore.FOLDER / "candidates.jsonl")
    assert {(e["name"], e["seed"]) for e in done} == {(n, s) for n, c in candidates.items() for s in c["seeds"]}
    for entry in done:
        assert (entry["lr"], entry["steps"], entry["overrides"]) == tuple(
            candidates[entry["name"]][key] for key in ("lr", "steps", "overrides")
        )
