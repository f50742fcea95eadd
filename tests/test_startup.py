"""The start-up check: each refusal names key, value and mend; what is right is silent."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from tests_support import PRESETS, compose_in_process

import verl_prefix.hydra_group
from verl_prefix import startup, training_data
from verl_prefix.config import PrefixConfig
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError

PROMPT = [{"role": "user", "content": "1+1="}]


def write(path, demos=None, **columns):
    count = len(demos) if demos is not None else len(next(iter(columns.values())))
    table = {
        "prompt": [PROMPT] * count,
        "extra_info": [{"index": i, "split": "train"} for i in range(count)],
        **columns,
    }
    if demos is not None:
        table["demos"] = demos
    pq.write_table(pa.table(table), path)
    return str(path)


class CharTokenizer:
    all_special_ids = [ord("$")]
    eos_token_id = ord("$")
    is_fast = True

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A composed configuration that passes the check."""
    import hydra as hydra_module

    verl_prefix.hydra_group.register(hydra_module)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 128}))
    monkeypatch.setattr(startup, "_tokenizer", lambda config: CharTokenizer())
    overrides = [
        "+prefix=prefix_rft",
        f"data.train_files={write(tmp_path / 'train.parquet', [['abcdef'], []], demos_steps=[[[3, 6]], []])}",
        f"data.val_files={write(tmp_path / 'val.parquet', data_source=['x'])}",
        "data.max_prompt_length=32",
        "data.max_response_length=32",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.rollout.name=vllm",
        "trainer.total_training_steps=500",
        "trainer.logger=[console]",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def test_a_correct_run_is_silent(config):
    assert startup.check(config) == []


@pytest.mark.parametrize(
    ("key", "value", "mend"),
    [
        ("algorithm.rollout_correction.bypass_mode", True, "Set it to false"),
        ("trainer.v1.trainer_mode", "colocate_async", "prefix_colocate_async"),
        ("trainer.v1.trainer_mode", "separate_async", "without GPUs"),
        ("trainer.v1.trainer_mode", "sync", "prefix_sync"),
        ("trainer.use_v1", False, "leave it true"),
        ("actor_rollout_ref.rollout.agent.default_agent_loop", "single_turn_agent", "prefix_agent"),
        ("actor_rollout_ref.rollout.multi_turn.enable", True, "set it to false"),
        ("actor_rollout_ref.rollout.max_model_len", 63, "at least 64"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla", "prefix_rft"),
        ("algorithm.adv_estimator", "gae", "prefix_rft"),
        ("prefix.sampling.rollouts", 9, "raise n"),
        ("prefix.sampling.min_prefix_len", 32, "no room for a continuation"),
        ("prefix.sampling.high", 0.5, "must not be below"),
        ("data.max_response_length", 4096, "128"),
    ],
)
def test_refusals(config, key, value, mend):
    with open_dict(config):
        OmegaConf.update(config, key, value)
    with pytest.raises((PrefixConfigError, DemonstrationError)) as caught:
        startup.check(config)
    assert key.split(".")[-1] in str(caught.value)
    assert mend in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key", "mend"),
    [
        ({"sampling.rollouts": 8, "gate.max_correct": 0}, "prefix.sampling.rollouts", "raise n"),
        ({"sampling.rollouts": 8, "advantage.baseline": "on_policy"}, "prefix.sampling.rollouts", "raise n"),
        ({"sampling.rollouts": 2, "sampling.law": "adaptive"}, "prefix.sampling.shared", "set it to true"),
        ({"loss.policy_ratio": "log"}, "prefix.loss.policy_ratio", "both or neither"),
        ({"advantage.on_policy": "likelihood"}, "prefix.loss.policy_ratio", "both or neither"),
        (
            {"advantage.baseline": "on_policy", "advantage.normalize_std": True},
            "prefix.advantage.normalize_std",
            "baseline=group",
        ),
        (
            {"sampling.law": "whole", "loss.update_prefix": False, "sft.weight.initial": 1.0},
            "prefix.advantage.baseline",
            "on_policy",
        ),
        ({"sampling.at_steps": True}, "prefix.sampling.at_steps", "law=binomial"),
        ({"sft.token_weight": "focl"}, "prefix.sft.token_weight", "choose one of none, p, p_1_p"),
        ({"sft.mix": "convex", "sft.weight.initial": 1.5}, "prefix.sft.weight", "must not exceed 1"),
        (
            {"sampling.law": "whole", "loss.update_prefix": False, "advantage.baseline": "on_policy"},
            "prefix.loss.update_prefix",
            "prefix.sft.weight",
        ),
    ],
)
def test_options_that_need_each_other(config, changes, key, mend):
    for name, value in changes.items():
        OmegaConf.update(config, f"prefix.{name}", value)
    with pytest.raises(PrefixConfigError) as caught:
        startup.check(config)
    assert str(caught.value).startswith(key)
    assert mend in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(config, preset):
    """The preset's own keys on this run's data and model: silent, as a correct run is."""
    chosen = compose_in_process(f"+prefix={preset}", "data.max_response_length=32")
    with open_dict(config):
        config.prefix = chosen.prefix
        for key in ("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"):
            OmegaConf.update(config, key, OmegaConf.select(chosen, key))
    OmegaConf.update(config, "prefix.demonstrations.demo_ratio", 1.0)  # of the two rows here, a tenth may be none
    assert startup.check(config) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.v1.trainer_mode", "prefix_sync"),
        ("algorithm.adv_estimator", "dr_grpo_prefix"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "prefix_rft"),
    ],
)
def test_a_name_of_the_plugins_without_the_preset_is_refused(config, key, value):
    plain = OmegaConf.create(OmegaConf.to_container(config))
    del plain.prefix
    plain.trainer.v1.trainer_mode, plain.algorithm.adv_estimator = "sync", "grpo"
    plain.actor_rollout_ref.actor.policy_loss.loss_mode = "vanilla"
    assert not startup.concerns(plain)
    OmegaConf.update(plain, key, value)
    assert startup.concerns(plain)
    with pytest.raises(PrefixConfigError, match=r"prefix=None.*\+prefix=prefix_rft"):
        startup.check(plain)


def test_unresolved_group_is_refused(config):
    with open_dict(config):
        config.prefix = "prefix_rft"
    with pytest.raises(PrefixConfigError, match=r"prefix='prefix_rft'.*not resolved"):
        startup.check(config)


def test_tied_embeddings_are_refused_on_the_cpu_engine(config):
    from pathlib import Path

    folder = Path(config.actor_rollout_ref.model.path)
    made = {"model_type": "qwen2", "max_position_embeddings": 128, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(made))
    assert startup.check(config) == []
    config.trainer.device = "cpu"
    with pytest.raises(PrefixConfigError, match="ties its embeddings.*tie_word_embeddings=false"):
        startup.check(config)


def test_multimodal_model_is_refused(config):
    from pathlib import Path

    folder = Path(config.actor_rollout_ref.model.path)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(PrefixConfigError, match="multimodal"):
        startup.check(config)


@pytest.mark.parametrize(
    ("key", "value", "warning"),
    [
        ("actor_rollout_ref.rollout.n", 1, "group of one"),
        ("algorithm.use_kl_in_reward", True, "use_kl_loss"),
        ("trainer.v1.sampler.sync_refill_failed_groups", True, "for ever"),
        ("trainer.total_training_steps", 100, r"Set prefix.schedule.steps=100"),
    ],
)
def test_supported_but_unwise_is_one_actionable_warning(config, key, value, warning, monkeypatch):
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    OmegaConf.update(config, key, value)
    (found,) = startup.check(config)
    assert warning in found


def test_equal_log_folders_are_refused(config):
    with open_dict(config):
        config.trainer.rollout_data_dir = config.trainer.validation_data_dir = "logs"
    with pytest.raises(PrefixConfigError, match="validation_data_dir"):
        startup.check(config)


def data_check(train, val=(), **prefix):
    return training_data.check(
        PrefixConfig.of(prefix), train_files=train, val_files=val, tokenizer=CharTokenizer(), response_length=8
    )


def test_missing_file(tmp_path):
    with pytest.raises(PrefixConfigError, match=r"data.train_files=.*nowhere.parquet.*does not exist"):
        data_check([str(tmp_path / "nowhere.parquet")])


def test_training_file_without_the_column(tmp_path):
    file = write(tmp_path / "plain.parquet", data_source=["x"])
    with pytest.raises(DemonstrationError, match=r"plain.parquet: has no column 'demos'.*prefix.demonstrations.column"):
        data_check([file])


@pytest.mark.parametrize("demos", [[[], []], [["abcdefgh"], ["toolongtoo"]], [["a$b"], [""]]])
def test_training_file_with_no_usable_demonstration(tmp_path, demos):
    with pytest.raises(DemonstrationError, match="none of the demonstrations in 'demos' can be used"):
        data_check([write(tmp_path / "train.parquet", demos)])


def test_demo_ratio_that_leaves_nothing(tmp_path):
    file = write(tmp_path / "train.parquet", [["abc"]] * 4)
    with pytest.raises(DemonstrationError, match=r"prefix.demonstrations.demo_ratio=0.0 drops all 4 rows"):
        data_check([file], demonstrations={"demo_ratio": 0.0})


def test_null_index_late_in_the_file(tmp_path):
    count = 100
    extra = [{"index": i if i != 90 else None} for i in range(count)]
    rows = {"prompt": [PROMPT] * count, "extra_info": extra, "demos": [["abc"]] * count}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    with pytest.raises(DemonstrationError, match=r"train.parquet: row 90, extra_info.index is None"):
        data_check([str(tmp_path / "train.parquet")])


def test_training_rows_of_another_agent(tmp_path):
    file = write(tmp_path / "train.parquet", [["abc"], ["abd"]], agent_name=["prefix_agent", "tool_agent"])
    with pytest.raises(DemonstrationError, match=r"row 1, agent_name is 'tool_agent'.*Drop the column"):
        data_check([file])


def test_string_columns_in_other_arrow_clothes(tmp_path):
    column = pa.array([["abc"], ["abd"]], type=pa.list_(pa.string(), 1))
    table = pa.table({"prompt": [PROMPT] * 2, "extra_info": [{"index": 0}, {"index": 1}], "demos": column})
    pq.write_table(table, tmp_path / "train.parquet")
    assert data_check([str(tmp_path / "train.parquet")]) == []


def test_wrong_type_names_row_and_position(tmp_path):
    with pytest.raises(DemonstrationError, match=r"train.parquet: row 1, demos\[0\] is int"):
        data_check([write(tmp_path / "train.parquet", [[], [1, 2]])])


def test_validation_rows_with_demonstrations(tmp_path):
    train = write(tmp_path / "train.parquet", [["abc"]])
    val = write(tmp_path / "val.parquet", [[], ["abc"]])
    with pytest.raises(
        DemonstrationError, match=r"val.parquet: validation row 1 carries a demonstration.*Drop the column"
    ):
        data_check([train], [val])
    other_agent = write(tmp_path / "val2.parquet", [["abc"]], agent_name=["single_turn_agent"])
    assert data_check([train], [other_agent]) == []
    empty = write(tmp_path / "val3.parquet", [[], None])
    assert data_check([train], [empty]) == []


def test_share_of_unusable_demonstrations_warns(tmp_path):
    file = write(tmp_path / "train.parquet", [["abc"], ["abcdefghijk"], ["a$c", "abd"], []])
    (warning,) = data_check([file])
    assert "2 of 4 demonstrations" in warning
    assert "does not fit the response limit" in warning


def test_rows_without_numbers_warn(tmp_path):
    count = 10
    rows = {"prompt": [PROMPT] * count, "extra_info": [{"index": 0}] * count, "demos": [["abc"]] * count}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    (warning,) = data_check([str(tmp_path / "train.parquet")])
    assert "only 1 values in 10 rows" in warning


def test_several_files_and_jsonl(tmp_path):
    jsonl = tmp_path / "train.jsonl"
    jsonl.write_text(json.dumps({"prompt": PROMPT, "extra_info": {"index": 7}, "demos": ["abc"]}) + "\n")
    assert data_check([write(tmp_path / "train.parquet", [["abc"]]), str(jsonl)]) == []


def test_the_asynchronous_trainer_is_a_correct_run_and_several_updates_a_step_are_refused(config):
    config.trainer.v1.trainer_mode = "prefix_colocate_async"
    assert startup.check(config) == []
    assert "trainer prefix_colocate_async" in startup.banner(config)
    OmegaConf.update(config, "trainer.v1.colocate_async.parameter_sync_step", 2, force_add=True)
    with pytest.raises(PrefixConfigError, match=r"colocate_async.parameter_sync_step=2.*ppo_mini_batch_size"):
        startup.check(config)


def test_main_ppo_stops_before_ray(tmp_path):
    """The real command line: an error within seconds, no Ray session, and the mend in the last lines."""
    train = write(tmp_path / "train.parquet", data_source=["x"])
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "+prefix=prefix_rft",
        f"data.train_files={train}",
        f"data.val_files={train}",
        "trainer.v1.trainer_mode=separate_async",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        f"hydra.run.dir={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "trainer.v1.trainer_mode='separate_async': this preset needs prefix_sync" in done.stderr
    assert "ray init kwargs" not in done.stdout


def test_warnings_reach_the_user(config, monkeypatch):
    import types

    config.actor_rollout_ref.rollout.n = 1
    module = types.ModuleType("config_module")
    module.validate_config = lambda config, use_reference_policy=False, use_critic=False: None
    startup.check_before_validation(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.validate_config(config=config)
    assert any("[verl_prefix]" in str(w.message) and "group of one" in str(w.message) for w in caught)


def test_demonstrations_marked_wrong_do_not_count(config, tmp_path):
    marked = write(tmp_path / "marked.parquet", [["abcdef"], []], demos_correct=[[False], []])
    OmegaConf.update(config, "data.train_files", str(marked))
    with pytest.raises(DemonstrationError, match="none of the demonstrations"):
        startup.check(config)


STEPS = {"sampling": {"law": "binomial", "at_steps": True}}


def test_a_file_without_steps_is_cut_by_tokens_and_says_so(tmp_path):
    file = write(tmp_path / "train.parquet", [["abc"]])
    (warning,) = data_check([file], **STEPS)
    assert "train.parquet has no column 'demos_steps'" in warning
    assert "prefix.sampling.at_steps=false" in warning
    assert data_check([file]) == []


@pytest.mark.parametrize("steps", [[[[1, 3]]], [[[]]], [[]], [None]])
def test_steps_of_the_right_type(tmp_path, steps):
    assert data_check([write(tmp_path / "train.parquet", [["abc"]], demos_steps=steps)], **STEPS) == []


@pytest.mark.parametrize("steps", [[3], [[3]], [[["a", "bc"]]], ["abc"], [[[0.5]]]])
def test_steps_of_another_type_are_refused(tmp_path, steps):
    file = write(tmp_path / "train.parquet", [["abc"]], demos_steps=steps)
    with pytest.raises(DemonstrationError, match=r"train.parquet: column 'demos_steps' is .*, not list<list<int>>"):
        data_check([file], **STEPS)
    assert data_check([file]) == [], "nobody asks for them"


def test_steps_need_a_fast_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(CharTokenizer, "is_fast", False)
    file = write(tmp_path / "train.parquet", [["abc"]], demos_steps=[[[1, 3]]])
    with pytest.raises(PrefixConfigError, match=r"prefix.sampling.at_steps=True: .*Set it to false"):
        data_check([file], **STEPS)
