"""The example of docs/extending.md, run as it stands there."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text()


@pytest.fixture
def example(tmp_path):
    """The page's two files where it says they lie."""
    files = dict(zip(("python", "yaml"), re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.S), strict=True))
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods/focal.py").write_text(files["python"])
    (tmp_path / "my_conf/prefix").mkdir(parents=True)
    (tmp_path / "my_conf/prefix/focal_sft.yaml").write_text(files["yaml"])
    return tmp_path


def test_it_is_short():
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.S)
    assert sum(len(block.splitlines()) for block in blocks) < 30


def test_the_command_composes_and_the_weight_is_known_to_the_check(example):
    command = (
        re.search(r"```bash\n(.*?)```", PAGE, re.S)[1]
        .replace("...", "--cfg job")
        .replace("python -m", f"{sys.executable} -m")
    )
    path = os.pathsep.join([str(example), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", command], cwd=example, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert "token_weight: focal" in done.stdout
    assert "law: whole" in done.stdout, "what it builds on"
    code = "import verl; from verl_prefix.objective import TOKEN_WEIGHTS; assert 'focal' in TOKEN_WEIGHTS"
    env = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "my_methods.focal"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=example)


def test_the_term_is_what_the_page_says(example, monkeypatch):
    from verl_prefix import objective
    from verl_prefix.config import SFTConfig

    monkeypatch.setattr(objective, "TOKEN_WEIGHTS", dict(objective.TOKEN_WEIGHTS))
    exec((example / "my_methods/focal.py").read_text(), {})
    log_prob = torch.tensor([[0.2, 0.9]], dtype=torch.float64).log().requires_grad_()
    term = objective.demonstration_nll(
        log_prob, torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.5]), config=SFTConfig(token_weight="focal")
    )
    assert term.item() == pytest.approx(-0.5 * (0.8**2 * math.log(0.2) + 0.1**2 * math.log(0.9)))
