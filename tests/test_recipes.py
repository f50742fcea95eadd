"""Every shell recipe parses, and what the recipes for GPUs hand to verl composes and passes the start-up check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import Template
from omegaconf import OmegaConf
from tests_support import GPU_RECIPES, PRESETS, RECIPES, compose_in_process

from verl_prefix import startup
from verl_prefix.config import PrefixConfig

SCRIPTS = sorted(RECIPES.rglob("*.sh"))
MODELS = sorted(file.stem for file in RECIPES.glob("8gpu/models/*.sh"))
ABLATIONS = [preset for preset in PRESETS if preset.startswith("prefix_rft_")]
#: published settings: response length, prompts a step, prompts an update, learning rate
COMMON = (8192, 128, 64, 1e-6)
SETTINGS = {
    **dict.fromkeys(GPU_RECIPES, COMMON),
    "hpt": (8192, 128, 64, 5e-6),
    "uft": (1024, 256, 64, 1e-6),
    "chord_mu": (10240, 32, 32, 1e-6),
    "chord_phi": (10240, 32, 32, 1e-6),
}
ROLLOUTS = {"uft": 4, "chord_mu": 9, "chord_phi": 9, "hpt": 9, "srft": 9, "superrl": 9}


@pytest.fixture
def fake(tmp_path):
    """fake(name): an executable `name`, first on the PATH, that writes its arguments to a file, NUL-ended."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name: str) -> Path:
        record = tmp_path / f"{name}.arguments"
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >{record}\n')
        (folder / name).chmod(0o755)
        return record

    return make


def arguments(record: Path) -> list[str]:
    return record.read_text().split("\0")[:-1]


def call(tmp_path: Path, *command, **env: str) -> subprocess.CompletedProcess:
    given = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), **env}
    return subprocess.run(["bash", *command], capture_output=True, text=True, env=given, timeout=60, cwd=RECIPES.parent)


def overrides_of(tmp_path, fake, recipe: str, *more: str, **env: str) -> list[str]:
    record = fake("python")
    done = call(tmp_path, RECIPES / f"8gpu/{recipe}.sh", *more, **env)
    assert done.returncode == 0, done.stderr
    module, name, *overrides = arguments(record)
    assert [module, name] == ["-m", "verl.trainer.main_ppo"]
    return overrides


def checked(overrides: list[str], preset: str, *, short: bool = False):
    """The composed configuration, after all of the start-up check that needs no files.

    It warns of nothing, except that a `short` run ends before its schedule.
    """
    config = compose_in_process(*overrides)
    prefix = PrefixConfig.of(config.prefix)
    assert prefix.preset == preset
    assert config.trainer.v1.trainer_mode == "prefix_sync"
    assert startup._check_trainer(config, prefix) == []
    assert startup._check_lengths(config, prefix) == []
    startup._check_combination(config, prefix)
    if prefix.sampling.rollouts > 0:
        warnings = startup._check_method(config, prefix)
        assert [w for w in warnings if not (short and w.startswith("prefix.schedule.steps="))] == []
    # verl refuses batches and mini-batches that the devices cannot share evenly, the latter only once it trains
    data, actor, n = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    devices = config.trainer.n_gpus_per_node * config.trainer.nnodes
    assert data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert data.train_batch_size * n % devices == actor.ppo_mini_batch_size * n % devices == 0
    assert actor.ppo_max_token_len_per_gpu >= data.max_prompt_length + data.max_response_length
    return config


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(RECIPES)))
def test_parses(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_every_method_has_a_recipe():
    assert set(GPU_RECIPES) == set(PRESETS) - set(ABLATIONS)


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_gpu_recipe(recipe, tmp_path, fake):
    text = (RECIPES / f"8gpu/{recipe}.sh").read_text()
    assert "arXiv" in text
    assert "Not run by this project (no GPU)" in " ".join(text.replace("#", "").split())
    overrides = overrides_of(tmp_path, fake, recipe, "trainer.nnodes=2", "trainer.experiment_name=mine")
    assert overrides[-2:] == ["trainer.nnodes=2", "trainer.experiment_name=mine"], "the user's come last"
    config = checked(overrides, recipe)
    actor = config.actor_rollout_ref.actor
    published = config.data.max_response_length, config.data.train_batch_size, actor.ppo_mini_batch_size, actor.optim.lr
    assert published == SETTINGS[recipe]
    assert config.actor_rollout_ref.rollout.n == ROLLOUTS.get(recipe, 8)
    assert config.trainer.total_training_steps == 500
    assert (config.trainer.n_gpus_per_node, config.trainer.nnodes) == (8, 2)
    assert config.trainer.experiment_name == "mine"
    assert config.data.max_prompt_length == 1024
    assert config.reward.custom_reward_function.path == "pkg://verl_prefix.reward"


@pytest.mark.parametrize("model", MODELS)
def test_model_fits_into_a_recipe(model, tmp_path, fake):
    config = checked(overrides_of(tmp_path, fake, "prefix_rft", MODEL_NAME=model, MODEL_PATH="/models/x"), "prefix_rft")
    assert config.actor_rollout_ref.model.path == "/models/x"
    assert config.trainer.experiment_name == f"prefix_rft_{model}"


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablation_runs_from_the_recipe_of_prefix_rft(ablation, tmp_path, fake):
    assert ablation.removeprefix("prefix_rft") in (RECIPES / "8gpu/prefix_rft.sh").read_text()
    checked(overrides_of(tmp_path, fake, "prefix_rft", PRESET=ablation), ablation)


def test_hpt_follows_its_model(tmp_path, fake):
    small = checked(overrides_of(tmp_path, fake, "hpt", MODEL_NAME="qwen2.5_math_1.5b"), "hpt")
    llama = checked(overrides_of(tmp_path, fake, "hpt", MODEL_NAME="llama3.1_8b"), "hpt")
    assert (small.prefix.sft.weight.initial, small.prefix.gate.max_correct) == (0.3, 0)
    assert (llama.prefix.sft.weight.initial, llama.prefix.gate.max_correct) == (1.0, 2)


def test_chat_template_of_llama_survives_the_shell_and_hydra(tmp_path, fake):
    config = checked(overrides_of(tmp_path, fake, "prefix_rft", MODEL_NAME="llama3.1_8b"), "prefix_rft")
    template = Template(config.actor_rollout_ref.model.custom_chat_template)
    assert template.render(messages=[{"role": "user", "content": "1+1?"}]) == "Question: 1+1?\nAnswer:"


def test_unknown_model_is_refused(tmp_path):
    done = call(tmp_path, RECIPES / "8gpu/luffy.sh", MODEL_NAME="qwen9")
    assert done.returncode == 2
    assert "qwen9" in done.stderr
    assert "qwen2.5_math_7b" in done.stderr


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_cpu_overlay_makes_a_recipe_small_and_leaves_its_method_alone(recipe, tmp_path, fake):
    record = fake("python")
    fake("verl-prefix")
    file, run = RECIPES / f"8gpu/{recipe}.sh", tmp_path / "run"
    done = call(tmp_path, RECIPES / "cpu_overlay.sh", file, "/testbed", run, "3", "data.seed=7")
    assert done.returncode == 0, done.stderr
    small = checked(arguments(record)[2:], recipe, short=True)
    full = compose_in_process(*overrides_of(tmp_path, fake, recipe))
    for part in ("prefix", "algorithm", "actor_rollout_ref.actor.optim", "actor_rollout_ref.actor.policy_loss"):
        assert OmegaConf.select(small, part) == OmegaConf.select(full, part)
    assert small.actor_rollout_ref.rollout.n == full.actor_rollout_ref.rollout.n
    assert small.data.train_files == "/testbed/train.parquet"
    assert small.actor_rollout_ref.model.path == "/testbed/model"
    assert Path(small.reward.custom_reward_function.path).is_file()
    assert small.data.max_prompt_length + small.data.max_response_length == 48
    assert (small.trainer.total_training_steps, small.data.seed) == (3, 7)
    assert set(small.trainer.logger) == {"console", "file"}
    assert small.trainer.default_local_dir == f"{run}/checkpoints"


def test_cpu_overlay_runs_two_steps_unless_told(tmp_path, fake):
    record = fake("python")
    fake("verl-prefix")
    call(tmp_path, RECIPES / "cpu_overlay.sh", RECIPES / "8gpu/grpo.sh", "/testbed", tmp_path / "run", "data.seed=7")
    assert compose_in_process(*arguments(record)[2:]).trainer.total_training_steps == 2
    assert "data.seed=7" in arguments(record)


def test_cpu_overlay_passes_a_failure_on(tmp_path, fake):
    fake("verl-prefix")
    (tmp_path / "bin/python").write_text("#!/bin/bash\necho broken >&2\nexit 3\n")
    (tmp_path / "bin/python").chmod(0o755)
    run = tmp_path / "run"
    done = call(tmp_path, RECIPES / "cpu_overlay.sh", RECIPES / "8gpu/grpo.sh", "/testbed", run)
    assert done.returncode == 3
    assert "broken" in (run / "console.log").read_text()


# -- several nodes

SHARED = {
    "TRAIN": "/shared/train.parquet",
    "VAL": "/shared/val.parquet",
    "OUT": "/shared/run",
    "MODEL_PATH": "/shared/m",
}


def submit(tmp_path, fake, *words: str, recipe: str = "recipes/8gpu/luffy.sh", **env: str):
    record = fake("ray")
    (tmp_path / "bin/python").symlink_to(sys.executable)
    done = call(tmp_path, RECIPES / "submit_multinode.sh", recipe, *words, **{**SHARED, **env})
    return done, arguments(record) if record.exists() else None


def test_submits_a_recipe_to_several_nodes(tmp_path, fake):
    words = ["trainer.logger=[console,wandb]", "data.x=${data.max_prompt_length}", "a='b'"]
    done, given = submit(tmp_path, fake, *words, NNODES="4", RAY_API_SERVER_ADDRESS="http://h:8265", MODEL_PATH="a/b")
    assert done.returncode == 0, done.stderr
    split = given.index("--")
    assert given[:2] == ["job", "submit"]
    options = dict(zip(given[2:split:2], given[3:split:2], strict=True))
    assert options["--address"] == "http://h:8265"
    assert Path(options["--working-dir"]) == RECIPES.parent
    environment = json.loads(options["--runtime-env-json"])["env_vars"]
    expected = {**SHARED, "MODEL_PATH": "a/b", "VERL_PLATFORM": "nvidia"}
    assert environment == {**expected, "VERL_USE_EXTERNAL_MODULES": "verl_prefix.plugin"}
    # what Ray makes of the words, and the shell on the head node of that
    line = subprocess.list2cmdline(given[split + 1 :])
    shell = subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, text=True, check=True)
    assert shell.stdout.split("\0")[:-1] == ["bash", "recipes/8gpu/luffy.sh", "trainer.nnodes=4", *words]


def test_submitted_recipe_composes_for_all_nodes(tmp_path, fake):
    _, given = submit(tmp_path, fake, NNODES="4")
    words = given[given.index("--") + 3 :]
    (tmp_path / "bin/python").unlink()
    config = checked(overrides_of(tmp_path, fake, "luffy", *words), "luffy")
    assert config.trainer.nnodes == 4


@pytest.mark.parametrize(
    ("env", "names"),
    [
        ({"OUT": "runs/x"}, "OUT"),
        ({"TRAIN": ""}, "TRAIN"),
        ({"MODEL_PATH": "recipes"}, "MODEL_PATH"),
        ({"MODEL_PATH": ""}, "MODEL_PATH"),
        ({"PASS": "NCCL_ALGO"}, "NCCL_ALGO"),
        ({"recipe": "/etc/hostname"}, "hostname"),
    ],
)
def test_what_other_nodes_could_not_use_is_refused(env, names, tmp_path, fake):
    done, given = submit(tmp_path, fake, **env)
    assert done.returncode != 0
    assert names in done.stderr
    assert given is None, "nothing was submitted"


def test_override_that_ray_would_split_is_refused(tmp_path, fake):
    done, given = submit(tmp_path, fake, "trainer.experiment_name=two words")
    assert done.returncode == 2
    assert "two words" in done.stderr
    assert given is None


def test_passed_variables_reach_the_job(tmp_path, fake):
    _, given = submit(tmp_path, fake, PASS="NCCL_SOCKET_IFNAME UNSET", NCCL_SOCKET_IFNAME="eth0")
    environment = json.loads(given[given.index("--runtime-env-json") + 1])["env_vars"]
    assert environment["NCCL_SOCKET_IFNAME"] == "eth0"
    assert "UNSET" not in environment


def test_variables_that_verl_hands_on_itself_are_the_refused_ones(monkeypatch):
    """Ray refuses a job whose runtime environment and ray.init name the same variable (contract with verl 0.9.1)."""
    from verl.trainer.constants_ppo import NVTX_INJECTION_ENV, PPO_RAY_RUNTIME_ENV, get_ppo_ray_runtime_env

    text = (RECIPES / "submit_multinode.sh").read_text()
    refused = set(text.split('TAKEN = """')[1].split('"""')[0].split())
    for name in refused - {"TRANSFER_QUEUE_ENABLE"} | set(PPO_RAY_RUNTIME_ENV["env_vars"]):
        monkeypatch.setenv(name, "1")
    handed_on = set(get_ppo_ray_runtime_env()["env_vars"])
    assert handed_on == refused - {"TRANSFER_QUEUE_ENABLE", NVTX_INJECTION_ENV}


def test_verl_imports_the_plugin_by_name_alone():
    """What submit_multinode.sh relies on where the plugin comes with the working directory and is not installed."""
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "verl_prefix.plugin"}
    code = "import verl, sys; assert sys.modules['verl_prefix.plugin']._active"
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=RECIPES.parent, timeout=120)


def test_unknown_option_of_the_quickstart_is_refused():
    done = subprocess.run(["bash", RECIPES / "quickstart_cpu.sh", "--gpro"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--gpro" in done.stderr
