"""The CPU platform: verl's surface is complete, settings are put where nothing else works, and left alone elsewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import verl
from omegaconf import OmegaConf
from verl.plugin.platform import platform_cuda

from verl_prefix import cpu
from verl_prefix.cpu import settings
from verl_prefix.cpu.platform import PlatformCPU, build_device_module


def test_every_public_member_of_verls_platform_is_there():
    platform = PlatformCPU()
    for name, member in inspect.getmembers(platform_cuda.PlatformCUDA):
        if not name.startswith("_"):
            assert hasattr(platform, name), name
            if callable(member):
                ours = inspect.signature(getattr(PlatformCPU, name)).parameters
                assert list(ours) == list(inspect.signature(member).parameters), name


def test_a_driver_of_a_remote_cluster_is_not_taken_for_a_cpu_machine(monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    assert cpu.chosen()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not cpu.chosen()
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert cpu.chosen()


def test_current_device_is_something_a_tensor_can_move_to():
    assert torch.zeros(1).to(PlatformCPU().current_device()).device.type == "cpu"


def test_device_module_has_what_verl_calls_on_it():
    """Every `get_torch_device().NAME` in verl's FSDP, vLLM and trainer code."""
    root = Path(verl.__file__).parent
    called = set()
    for folder in ("workers/engine/fsdp", "workers/rollout/vllm_rollout", "trainer", "utils", "checkpoint_engine"):
        for file in (root / folder).rglob("*.py"):
            if not re.search("npu|megatron|veomni|sglang|kimi|mooncake|nixl", str(file.relative_to(root))):
                called |= set(re.findall(r"get_torch_device\(\)\.(\w+)", file.read_text()))
    module = build_device_module()
    assert {"empty_cache", "synchronize", "get_rng_state"} <= called
    # CUDA graphs, memory recording and caching allocators have no meaning here and are not reached
    assert {name for name in called if not hasattr(module, name)} <= {"memory", "caching_allocator_delete"}
    assert module.mem_get_info()[1] > module.mem_get_info()[0] > 0


@pytest.fixture
def config():
    import hydra as hydra_module
    from hydra import compose, initialize_config_module

    import verl_prefix.hydra_group

    verl_prefix.hydra_group.register(hydra_module)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["+prefix=prefix_rft", "trainer.n_gpus_per_node=2"])


def test_settings_are_applied_once_and_said(config):
    changed = settings.apply(config)
    assert config.trainer.device == "cpu"
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"
    assert config.actor_rollout_ref.rollout.free_cache_engine is False
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "fp32"
    assert config.ray_kwargs.ray_init.num_gpus == 2
    assert "trainer.device=cpu" in changed
    assert settings.apply(config) == []


def test_a_choice_of_the_users_is_kept(config):
    OmegaConf.update(config, "actor_rollout_ref.rollout.agent.num_workers", 3)
    OmegaConf.update(config, "actor_rollout_ref.rollout.dtype", "float16")
    settings.apply(config)
    assert config.actor_rollout_ref.rollout.agent.num_workers == 3
    assert config.actor_rollout_ref.rollout.dtype == "float16"


def test_defaults_named_in_settings_are_verls(config):
    """If verl changes a default, `SUITABLE` would silently stop applying."""
    for key, (default, _) in settings.SUITABLE.items():
        assert OmegaConf.select(config, key) == default, key
