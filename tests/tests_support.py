"""What several test modules need: the presets, composed without a new process each, and what a run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from verl_prefix import presets

PRESETS = presets.names()
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
#: methods with a recipe in recipes/8gpu; common.sh is what they share
GPU_RECIPES = sorted(file.stem for file in RECIPES.glob("8gpu/*.sh") if file.stem != "common")


def compose_in_process(*overrides: str):
    """verl's PPO configuration with `overrides`, as main_ppo would compose it."""
    import hydra as hydra_module
    from hydra import compose, initialize_config_module

    import verl_prefix.hydra_group

    verl_prefix.hydra_group.register(hydra_module)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


@dataclass
class Run:
    """What a finished run left behind."""

    folder: Path
    output: str
    metrics: dict[int, dict] = field(default_factory=dict)
    rollouts: dict[int, list[dict]] = field(default_factory=dict)

    def __post_init__(self):
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            self.metrics.setdefault(entry["step"], {}).update(entry["data"])
        for file in sorted((self.folder / "rollouts").glob("*.jsonl"), key=lambda f: int(f.stem)):
            self.rollouts[int(file.stem)] = [json.loads(line) for line in file.read_text().splitlines()]

    def prefixed(self, step: int) -> list[dict]:
        return [rollout for rollout in self.rollouts[step] if rollout["role"] == "prefixed"]
