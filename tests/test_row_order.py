"""Advantages do not depend on the order in which rollouts came back, nor on how many workers train on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_run import PROMPTS, FakeRun, N
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_prefix import credit
from verl_prefix.advantage import prefix_rft
from verl_prefix.config import PrefixConfig


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    keep=st.sampled_from(["top", "bottom", "random"]),
    pool=st.sampled_from(["batch", "sequence"]),
)
def test_the_entropy_clip_chooses_the_same_tokens_in_any_order(seed, keep, pool):
    rng, rows, tokens = np.random.default_rng(seed), 12, 6
    config = PrefixConfig.of({"entropy_clip": {"keep": keep, "pool": pool, "share": 0.4}})
    row_index, session = [f"row{i // 3}" if i < 6 else i // 3 for i in range(rows)], [i % 3 for i in range(rows)]
    length = torch.from_numpy(rng.integers(0, 5, rows))
    columns = {name: torch.zeros(rows) for name in ("demo_len", "low", "high", "hit_limit")}
    given_columns = {
        "token_level_rewards": torch.from_numpy(rng.normal(size=(rows, tokens))).float(),
        "response_mask": torch.ones(rows, tokens, dtype=torch.int64),
        "entropy": torch.from_numpy(rng.integers(0, 2, (rows, tokens))).float(),  # nearly all of them ties
    }
    group = np.array([str(index) for index in row_index])

    def advantages(order):
        return credit.assign(
            prefix_rft,
            config=config,
            index=group[order],
            rows={"prefix_len": length[order], **{name: column[order] for name, column in columns.items()}},
            global_step=3,
            order=credit.row_order([row_index[i] for i in order], [session[i] for i in order]),
            **{name: column[order] for name, column in given_columns.items()},
        ).advantages

    order = rng.permutation(rows)
    torch.testing.assert_close(advantages(order), advantages(np.arange(rows))[order])


@pytest.mark.parametrize("keep", ["top", "random"])
def test_advantages_are_the_same_for_one_two_and_four_workers(monkeypatch, tmp_path, keep):
    """Through verl's own balancing, which deals rows out by length, and with equal entropies throughout."""
    found, orders = [], []
    for workers in (1, 2, 4):
        scores = iter([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
        run = FakeRun(
            monkeypatch,
            tmp_path / f"{keep}{workers}",
            "prefix.sampling.rollouts=2",
            f"prefix.entropy_clip.keep={keep}",
            "prefix.entropy_clip.share=0.3",
            score=lambda scores=scores, **_: {"score": next(scores), "acc": 0.0},
        )
        asked = run.server.requests
        run.server.answer = lambda request, asked=asked: "0" * (1 + request.prompt + 2 * len(asked) % 5)
        run.workers._dispatch_info = {"actor": list(range(workers))}
        run.step()
        trained = run.workers.trained.values()
        orders.append([(row["index"], row["prefix_len"].item()) for row in trained if row["prefix_len"] > 0])
        found.append({(row["index"], row["responses"].numel()): row["advantages"].tolist() for row in trained})
    assert len(found[0]) == PROMPTS * N
    assert any(len(set(row)) > 1 for row in found[0].values())
    assert orders[0] not in orders[1:]
    assert found[0] == found[1] == found[2]
