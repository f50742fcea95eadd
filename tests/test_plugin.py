"""Discovery, import boundary, idempotence, loud failure. Each in a fresh interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def test_entry_point_is_installed():
    (found,) = [e for e in importlib.metadata.entry_points(group="verl.plugins") if e.name == "verl_prefix"]
    assert found.value == "verl_prefix.plugin"


def test_importing_verl_pulls_in_no_engine_and_no_trainer():
    code = """
import sys, verl
heavy = [m for m in ("vllm", "verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.core_algos",
                     "verl.experimental.agent_loop", "matplotlib", "typer", "scipy", "hydra") if m in sys.modules]
print("loaded", "verl_prefix.plugin" in sys.modules, heavy)
"""
    assert "loaded True []" in python(code).stdout


def test_everything_is_registered_once_verl_imports_its_modules():
    code = """
import verl, importlib, verl_prefix.plugin as plugin
plugin.activate(); importlib.reload(plugin)
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
print(get_trainer_cls("prefix_sync").__name__, get_policy_loss_fn("prefix_rft").__name__)
print(*(get_adv_estimator_fn(n).__name__ for n in ("prefix_rft", "grpo_prefix", "dr_grpo_prefix", "dr_grpo_prefix_v2")))
print(_agent_loop_registry["prefix_agent"]["_target_"])
"""
    done = python(code)
    assert "PrefixTrainerSync policy_loss" in done.stdout, done.stderr
    assert "prefix_rft grpo_prefix dr_grpo_prefix dr_grpo_prefix_v2" in done.stdout
    assert "verl_prefix.agent_loop.shared_agent_loop" in done.stdout


@pytest.mark.parametrize("module", ["agent_loop", "trainer", "estimator", "policy_loss", "startup", "sft_dataset"])
def test_a_seam_can_be_imported_first(module):
    """Its hook runs while verl's module is imported from within the seam itself."""
    done = python(f"import verl_prefix.{module}; print('imported')")
    assert "imported" in done.stdout, done.stderr
    assert "[verl_prefix] ERROR" not in done.stderr


def test_a_failing_plugin_says_so():
    code = """
import sys
sys.modules["verl_prefix.cpu"] = None  # an import error inside the plugin
import verl
print("verl still loads")
"""
    done = python(code)
    assert "verl still loads" in done.stdout
    assert "[verl_prefix] ERROR: the plugin failed to load; this process runs WITHOUT the plugin." in done.stderr
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(("asked", "device"), [("cpu", "cpu"), ("nvidia", "cuda")])
def test_platform_can_be_overridden(asked, device):
    code = """
import verl
from verl.plugin.platform import get_platform
from verl.workers.rollout.replica import RolloutReplicaRegistry
print(get_platform().device_name, RolloutReplicaRegistry._registry["vllm"].__module__)
"""
    where = "verl_prefix.cpu.engines" if asked == "cpu" else "verl.workers.rollout.replica"
    assert f"{device} {where}" in python(code, VERL_PLATFORM=asked).stdout


def test_nothing_of_the_cpu_platform_is_active_with_an_accelerator():
    code = """
from verl.plugin.platform.platform_cuda import PlatformCUDA
PlatformCUDA.is_platform_available = lambda self, use_smi_check=False: True
import sys
for name in [n for n in sys.modules if n.startswith("verl_prefix")]:
    del sys.modules[name]
import os; os.environ.pop("VERL_PLATFORM", None)
from verl_prefix import cpu
print("active", cpu.activate(), [n for n in sys.modules if n.startswith("verl_prefix.cpu.") and "platform" not in n])
"""
    assert "active False []" in python(code, VERL_USE_EXTERNAL_PLUGINS="none").stdout
