"""Every shell recipe parses, and what the GPU recipes hand to verl composes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.sh"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_parses(recipe):
    assert recipe.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in recipe.read_text()
    subprocess.run(["bash", "-n", recipe], check=True)


def test_gpu_recipe_composes(tmp_path):
    python = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", RECIPES[0].parent / "prefix_rft_qwen2.5_math_7b.sh", "--cfg", "job"],
        capture_output=True,
        text=True,
        env={"PATH": f"{python}:/usr/bin:/bin", "OUT": str(tmp_path), "HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "loss_scale_factor: ${data.max_response_length}" in done.stdout
    assert "max_response_length: 8192" in done.stdout
    assert "adv_estimator: prefix_rft" in done.stdout
    assert "total_training_steps: 500" in done.stdout


def test_unknown_option_of_the_quickstart_is_refused():
    quickstart = RECIPES[0].parent / "quickstart_cpu.sh"
    done = subprocess.run(["bash", quickstart, "--gpro"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--gpro" in done.stderr
