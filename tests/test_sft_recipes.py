"""What the SFT recipes hand to verl, phase by phase."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from tests_support import RECIPES


@pytest.fixture
def shims(tmp_path):
    """`torchrun` and `python` that hand a recipe's command on to verl, in order, to be composed instead of run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("torchrun", "python"):
        script = f"""#!/usr/bin/env bash
while [ "$1" != -m ]; do shift; done
count=$(ls "{tmp_path}"/composed.*.yaml 2>/dev/null | wc -l)
exec "{sys.executable}" "$@" --cfg job >"{tmp_path}/composed.$count.yaml"
"""
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def composed(recipe, shims, out, *overrides):
    """The configurations that a recipe hands to verl, one after the other."""
    environment = {"PATH": f"{shims}:/usr/bin:/bin", "OUT": str(out), "HOME": str(out)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = subprocess.run(
        ["bash", RECIPES / recipe, *overrides], capture_output=True, text=True, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return [OmegaConf.create(file.read_text()) for file in sorted(shims.parent.glob("composed.*.yaml"))]


def finished_sft(folder, step=7):
    """What phase 1 leaves behind."""
    (folder / f"checkpoints/global_step_{step}/huggingface").mkdir(parents=True)
    (folder / f"checkpoints/global_step_{step}/huggingface/config.json").write_text("{}")
    (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(step))


@pytest.mark.parametrize(("recipe", "loss"), [("sft", "nll"), ("dft", "dft")])
def test_sft_recipe_composes_and_links_its_model(recipe, loss, shims, tmp_path):
    finished_sft(tmp_path)
    (config,) = composed(f"{recipe}_qwen2.5_math_7b.sh", shims, tmp_path, "optim.lr=1e-9")
    assert config.sft.loss == loss
    assert config.data.custom_cls.name == "DemonstrationDataset"
    assert config.optim.lr == 1e-9
    assert "hf_model" in config.checkpoint.save_contents
    # the two published bugs: nothing is offloaded, and the loss is verl's global token mean
    assert not any(config.engine[key] for key in ("optimizer_offload", "param_offload", "offload_policy"))
    assert (tmp_path / "model/config.json").is_file()


def test_sft_then_rl_recipe_trains_the_model_of_phase_1_on_the_same_file(shims, tmp_path):
    finished_sft(tmp_path / "sft")
    first, second = composed("sft_then_rl_qwen2.5_math_7b.sh", shims, tmp_path)
    assert first.data.train_files == second.data.train_files
    assert first.trainer.default_local_dir == f"{tmp_path}/sft/checkpoints"
    assert second.actor_rollout_ref.model.path == f"{tmp_path}/sft/model"
    assert (tmp_path / "sft/model/config.json").is_file()
    assert second.algorithm.adv_estimator == "grpo"
    assert second.prefix.sampling.rollouts == 0
    assert first.data.max_length == second.data.max_prompt_length + second.data.max_response_length


def test_sft_then_rl_recipe_does_not_repeat_phase_1(shims, tmp_path):
    finished_sft(tmp_path / "sft")
    (tmp_path / "sft/model").symlink_to("checkpoints/global_step_7/huggingface")
    (only,) = composed("sft_then_rl_qwen2.5_math_7b.sh", shims, tmp_path, "trainer.total_training_steps=50")
    assert only.trainer.total_training_steps == 50
    assert "actor_rollout_ref" in only
