"""Row weights of the SFT term."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_prefix.config import PrefixConfig
from verl_prefix.sft_weight import entropy_factor, mini_batches, sft_row_weights


@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=30),
    weight=st.floats(0.001, 2),
    mini_batches=st.integers(1, 4),
)
def test_a_pass_over_the_batch_is_the_global_token_mean_in_every_step(rows, weight, mini_batches):
    prefix_len, real = (torch.tensor(column) for column in zip(*rows, strict=True))
    got = sft_row_weights(prefix_len, real, weight=weight, mini_batches=mini_batches)
    tokens = torch.where(real, prefix_len, 0)
    if tokens.sum() == 0:
        assert torch.equal(got, torch.zeros(len(rows)))
        return
    # one over all tokens, mini_batches times
    torch.testing.assert_close((got * tokens).sum(), torch.tensor(weight * mini_batches), rtol=1e-5, atol=0)
    assert (got[tokens > 0] == got[tokens > 0][0]).all(), "a token counts the same in short and long demonstrations"
    assert (got[tokens == 0] == 0).all()


@given(st.integers(1, 50), st.integers(0, 50))
def test_what_a_gate_dropped_keeps_its_share(kept, dropped):
    got = sft_row_weights(
        torch.tensor([kept, 0]), torch.tensor([True, True]), weight=1.0, mini_batches=1, dropped_tokens=dropped
    )
    torch.testing.assert_close(got[0] * kept, torch.tensor(kept / (kept + dropped)), rtol=1e-5, atol=0)


def row_weights(monkeypatch, rows: int, dropped: int, mode: str, **sft) -> torch.Tensor:
    """What the trainer stores for `rows` rows, one demonstration of 10 tokens among them, of a step that asked for
    8 prompts x 3 in mini-batches of 4 prompts; a gate dropped `dropped` demonstration tokens."""
    from transfer_queue import KVBatchMeta

    from verl_prefix import trainer

    stored = {}
    monkeypatch.setattr(trainer.tq, "kv_batch_put", lambda **given: stored.update(given["fields"]))
    actor = SimpleNamespace(ppo_mini_batch_size=4, loss_agg_mode=mode)
    config = SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(actor=actor, rollout=SimpleNamespace(n=3)),
        data=SimpleNamespace(train_batch_size=8),
    )
    columns = {"prefix_len": torch.tensor([10] + [0] * (rows - 1)), "real": torch.ones(rows, dtype=torch.bool)}
    step = SimpleNamespace(config=config, prefix=PrefixConfig.of({"sft": sft}))
    step._step_columns, step._dropped_tokens, step._sft_weight = columns, dropped, 1.0
    step._entropy = lambda batch: torch.linspace(0, 2, rows)[:, None] + torch.arange(12) / 10
    step._demonstration_factor = partial(trainer.PrefixTrainerSync._demonstration_factor, step)
    batch = KVBatchMeta(partition_id="train", keys=[str(row) for row in range(rows)], tags=[{}] * rows)
    trainer.PrefixTrainerSync._put_sft_weights(step, batch)
    return stored["sft_weight"]


@pytest.mark.parametrize("mode", ["seq-mean-token-sum-norm", "seq-mean-token-mean", "token-sum"])
def test_a_gate_that_leaves_one_mini_batch_of_two_changes_no_weight(monkeypatch, mode):
    """verl divides the policy term of either by the rows of a full mini-batch (or by nothing)."""
    full = row_weights(monkeypatch, 24, 70, mode)
    half = row_weights(monkeypatch, 12, 70, mode)
    assert full[0].item() == half[0].item() == pytest.approx(2 / 80)


def test_a_token_mean_follows_what_is_left(monkeypatch):
    assert row_weights(monkeypatch, 24, 70, "token-mean")[0].item() == pytest.approx(2 / 80)
    assert row_weights(monkeypatch, 12, 70, "token-mean")[0].item() == pytest.approx(1 / 80)


def test_there_is_at_least_one_mini_batch():
    assert mini_batches("token-mean", planned=2, left=0) == 1


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_demonstration_may_weigh_by_its_mean_entropy(monkeypatch, sign):
    """Tokens 0 to 9 of row 0 have the entropies 0, 0.1, ..., 0.9; what stands behind the demonstration is not in it."""
    mode = "seq-mean-token-mean"
    plain = row_weights(monkeypatch, 24, 70, mode)
    weighted = row_weights(monkeypatch, 24, 70, mode, row_weight="entropy", entropy_sign=sign)
    assert weighted[0].item() == pytest.approx(plain[0].item() * math.exp(sign * 0.45), rel=1e-6)
    assert (weighted[1:] == 0).all()


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.lists(st.floats(0, 5), min_size=6, max_size=6)), min_size=1),
    sign=st.sampled_from([-1, 1]),
)
def test_entropy_factor_against_a_loop(rows, sign):
    prefix_len, entropy = (torch.tensor(column) for column in zip(*rows, strict=True))
    got = entropy_factor(entropy.double(), prefix_len, sign=sign).tolist()
    for factor, (length, values) in zip(got, rows, strict=True):
        expected = math.exp(sign * sum(values[:length]) / length) if length else 1.0
        assert factor == pytest.approx(expected, rel=1e-5)
