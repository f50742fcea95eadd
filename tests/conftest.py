"""Fixtures for the end-to-end runs: the testbed, and stock main_ppo through the project's own recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from tests_support import Run

# A first example can take long on a busy machine (the first torch operation does).
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]

# Tables in tests have the width that the test asks for: rich takes 80 columns for a terminal it calls dumb.
os.environ["TERM"] = "xterm"
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)

#: presets that between them touch every term of the objective; `--all-presets` runs the others too
CI_PRESETS = ("hpt", "luffy", "srft", "uft")
#: the recipe whose file runs by default: 9 rollouts a prompt, and not among CI_PRESETS
CI_RECIPES = ("chord_mu",)
_table: list[tuple[str, ...]] = []


@pytest.fixture(autouse=True)
def _same_environ():
    """`Dataset.map(num_proc=...)` leaves a copy in the place of `os.environ`; rich goes on with the one it was imported
    with, and no longer sees what a test sets."""
    before = os.environ
    yield
    os.environ = before  # noqa: B003  the object is to be put back, not its content


def pytest_addoption(parser):
    parser.addoption("--all-presets", action="store_true", help="run all presets and recipes end to end, not a few")


def pytest_generate_tests(metafunc):
    if "e2e_preset" in metafunc.fixturenames:
        from tests_support import PRESETS

        chosen = PRESETS if metafunc.config.getoption("--all-presets") else CI_PRESETS
        metafunc.parametrize("e2e_preset", chosen)
    if "e2e_recipe" in metafunc.fixturenames:
        from tests_support import GPU_RECIPES

        every = metafunc.config.getoption("--all-presets")
        metafunc.parametrize("e2e_recipe", [r for r in GPU_RECIPES if every or r in CI_RECIPES])


def pytest_terminal_summary(terminalreporter):
    for row in _table:
        terminalreporter.write_line(
            "  ".join(str(cell).rjust(width) for cell, width in zip(row, (22, 9, 9, 9, 9, 9), strict=True))
        )


@pytest.fixture(scope="session")
def preset_table() -> list[tuple[str, ...]]:
    """Rows of the table that is printed at the end."""
    if not _table:
        _table.append(("preset", "prefixed", "pg_loss", "sft_loss", "dropped", "corr"))
    return _table


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
        return _run(["recipes/testbed_cpu.sh", method, testbed, folder, str(steps), "0", *small, *overrides], folder)

    return run


@pytest.fixture(scope="session")
def run_recipe(testbed):
    """run_recipe(folder, recipe, steps, *overrides) -> Run, through recipes/cpu_overlay.sh."""

    def run(folder: Path, recipe: str, steps: int, *overrides: str) -> Run:
        file = f"recipes/8gpu/{recipe}.sh"
        return _run(["recipes/cpu_overlay.sh", file, testbed, folder, str(steps), *overrides], folder)

    return run


def _run(command: list, folder: Path) -> Run:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", *command],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return Run(folder, done.stdout)
