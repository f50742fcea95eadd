"""The loss on two and four workers (FSDP2 on gloo, processes of their own) against one: data-parallel, and with two
workers of each sequence (Ulysses)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("data_parallel_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    def of(workers: int, sequence: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        out = tmp_path_factory.mktemp("workers") / f"{workers}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
        done = subprocess.run(
            [*command, str(WORKER), str(out), str(sequence)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out, weights_only=True)

    return {(workers, sequence): of(workers, sequence) for workers, sequence in [(1, 1), *SPLITS]}


SPLITS = [(2, 1), (4, 1), (2, 2), (4, 2)]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "workers_{}_of_a_sequence_{}".format(*split))
def test_loss_and_gradient_are_those_of_one_worker(split, found):
    for aggregation, alone in found[1, 1].items():
        assert alone[1].abs().max() > 0
        for one, other in zip(found[split][aggregation], alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=aggregation)
