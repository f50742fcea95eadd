"""Fixtures for the end-to-end runs: the testbed, and stock main_ppo through the project's own recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def testbed(tmp_path_factory) -> Path:
    """The CPU testbed of seed 0 (about 40 s on one core). TESTBED names one that exists, to save the time."""
    if given := os.environ.get("TESTBED"):
        return Path(given)
    folder = tmp_path_factory.mktemp("testbed")
    subprocess.run([sys.executable, "-m", "data_prep.testbed", "--out", folder, "--seed", "0"], cwd=ROOT, check=True)
    return folder


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


@pytest.fixture(scope="session")
def train(testbed):
    """train(folder, method, steps, *overrides) -> Run, through recipes/testbed_cpu.sh, with small batches."""

    def run(folder: Path, method: str, steps: int, *overrides: str, testbed: Path = testbed) -> Run:
        small = (
            "data.train_batch_size=8",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.rollout.n=4",
            f"data.val_files={testbed}/val_small.parquet",
            "trainer.test_freq=4",
        )
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "recipes/testbed_cpu.sh", method, testbed, folder, str(steps), "0", *small, *overrides],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        return Run(folder, done.stdout)

    return run
