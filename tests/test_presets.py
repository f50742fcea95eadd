"""Every shipped YAML composes through the real command line, with the schema and without search-path arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests_support import PRESETS, compose_in_process

import verl_prefix
from verl_prefix.config import PrefixConfig


def compose(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, "--cfg", "job"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_composes(preset):
    config = compose_in_process(f"+prefix={preset}", "prefix.schedule.steps=7")
    prefix = PrefixConfig.of(config.prefix)
    assert prefix.preset == preset
    assert prefix.schedule.steps == 7
    assert config.trainer.v1.trainer_mode == "prefix_sync"
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "prefix_agent"


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_cites_its_method(preset):
    head = (Path(verl_prefix.__file__).parent / f"conf/prefix/{preset}.yaml").read_text().splitlines()[:3]
    assert head[0] == "# @package _global_"
    assert "arXiv" in head[1]


def test_prefix_rft_is_the_papers_setting():
    config = OmegaConf.create(compose("+prefix=prefix_rft", "data.max_response_length=8192").stdout)
    assert PrefixConfig.of(config.prefix) == PrefixConfig()
    actor = config.actor_rollout_ref.actor
    assert (actor.loss_agg_mode, actor.loss_scale_factor) == ("seq-mean-token-sum-norm", 8192)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.2, 0.2, 3.0)
    assert (actor.entropy_coeff, actor.use_kl_loss) == (0.001, False)
    assert config.actor_rollout_ref.rollout.n == 8
    assert config.algorithm.adv_estimator == "prefix_rft"


def test_unknown_preset_lists_the_known_ones():
    done = compose("+prefix=prefix_rtf")
    assert done.returncode != 0
    assert "prefix_rft" in done.stderr


def test_unknown_key_and_wrong_type_fail_while_parsing():
    for override in ("prefix.shedule.steps=7", "prefix.schedule.steps=seven"):
        done = compose("+prefix=prefix_rft", override)
        assert done.returncode != 0
        assert "steps" in done.stderr or "shedule" in done.stderr


def test_without_the_group_verl_is_untouched():
    config = OmegaConf.create(compose().stdout)
    assert "prefix" not in config
    assert config.trainer.v1.trainer_mode == "sync"
