"""What the trainer fetches and puts back in a step, against a store that keeps rows as TransferQueue does."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta

from verl_prefix import trainer
from verl_prefix.trainer import PrefixTrainerSync


@pytest.fixture
def store(monkeypatch):
    """(field, key) -> value. `fetched` lists (fields, keys) of each get."""
    kept = SimpleNamespace(values={}, fetched=[])

    def get(*, keys, partition_id, select_fields):
        kept.fetched.append((set(select_fields), list(keys)))
        found = {name: [kept.values[name, key] for key in keys] for name in select_fields}
        packed = {
            name: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
            if isinstance(rows[0], torch.Tensor)
            else NonTensorStack(*rows)
            for name, rows in found.items()
        }
        return TensorDict(packed, batch_size=len(keys))

    def put(*, keys, partition_id, fields):
        for name in list(fields.keys()):
            kept.values.update({(name, key): row for key, row in zip(keys, fields[name].unbind(), strict=True)})

    monkeypatch.setattr(trainer.tq, "kv_batch_get", get)
    monkeypatch.setattr(trainer.tq, "kv_batch_put", put)
    return kept


KEYS = ["a_0_0", "a_1_0", "pad_0_0"]
STEP_COLUMNS = {
    "keys": KEYS,
    "row_index": [7, 8, 8],
    "group": ["a", "a", "pad"],
    "session": [0, 1, 0],
    "prefix_len": torch.tensor([2, 0, 0]),
    "real": torch.tensor([True, True, False]),
    "trained": torch.tensor([True, True, False]),
    "demo_index": torch.tensor([0, -1, -1]),
    "demo_len": torch.tensor([5, 0, 0]),
    "ratio": torch.tensor([0.4, 0.0, 0.0]),
    "hit_limit": torch.tensor([False, False, False]),
}


def keep(store, name: str, rows: list) -> None:
    store.values.update({(name, key): row for key, row in zip(KEYS, rows, strict=True)})


def test_prefix_tokens_get_the_old_policys_log_probabilities_and_only_their_rows_are_put(store):
    rollout = [torch.tensor([0.0, 0.0, -1.0, -2.0]), torch.tensor([-3.0, -0.5]), torch.tensor([0.0])]
    old = [torch.tensor([-7.0, -8.0, -1.5, -2.5]), torch.tensor([-3.0, -0.5]), torch.tensor([-9.0])]
    keep(store, "rollout_log_probs", rollout)
    keep(store, "old_log_probs", old)
    step = SimpleNamespace(global_steps=1, _step_columns=STEP_COLUMNS)
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    metrics = PrefixTrainerSync._neutralise_prefix_rollout_log_probs(step, batch)

    assert store.values["rollout_log_probs", "a_0_0"].tolist() == [-7.0, -8.0, -1.0, -2.0]
    for key, before in zip(KEYS[1:], rollout[1:], strict=True):
        assert store.values["rollout_log_probs", key] is before
    # generated tokens of real rows: -1.0 against -1.5, -2.0 against -2.5, and two that agree
    differences = [abs(torch.tensor(x).exp() - torch.tensor(x - 0.5).exp()).item() for x in (-1.0, -2.0)] + [0.0, 0.0]
    assert metrics["training/rollout_probs_diff_max"] == pytest.approx(max(differences))
    assert metrics["training/rollout_probs_diff_mean"] == pytest.approx(sum(differences) / 4)


def test_nothing_is_put_where_no_row_has_a_prefix(store, monkeypatch):
    keep(store, "rollout_log_probs", [torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([0.0])])
    keep(store, "old_log_probs", [torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([0.0])])
    monkeypatch.delattr(trainer.tq, "kv_batch_put")
    columns = {**STEP_COLUMNS, "prefix_len": torch.zeros(3, dtype=torch.int64)}
    step = SimpleNamespace(global_steps=1, _step_columns=columns)
    batch = KVBatchMeta(partition_id="train", keys=KEYS, tags=[{}] * 3)
    metrics = PrefixTrainerSync._neutralise_prefix_rollout_log_probs(step, batch)
    assert metrics["training/rollout_probs_diff_max"] == 0


@pytest.mark.parametrize(
    ("advantages", "fetched", "spans"),
    [([[0.0, 0.5, 0.5], [0.25], []], ["a_0_0"], [[[1, 0.25]], [[1, 0.0], [3, 0.5]], []]),
     ([[], [], []], ["a_0_0"], [[], [], []]),
     ([[0.5] * 3, [0.25, 1.0], []], ["a_1_0", "a_0_0"], [[[1, 0.25], [2, 1.0]], [[3, 0.5]], []])],
    ids=["as published", "unknown", "varying"],
)  # fmt: skip
def test_the_rollout_log_fetches_the_responses_it_needs(store, advantages, fetched, spans):
    """Of prefixed rows, and of those whose tokens have several advantages."""
    keep(store, "responses", [torch.tensor([97, 98, 99]), torch.tensor([100, 101]), torch.tensor([0])])
    decode = lambda ids, skip_special_tokens: "".join(map(chr, ids))  # noqa: E731
    columns = {**STEP_COLUMNS, "advantages": [torch.tensor(row) for row in advantages]}
    step = SimpleNamespace(_step_columns=columns, tokenizer=SimpleNamespace(decode=decode))
    outputs = ["de"[: len(advantages[1]) or 1], "abc", ""]
    made = partial(PrefixTrainerSync._rollout_log_columns, step)(["a_1_0", "a_0_0", "pad_0_0"], outputs)
    assert made["prefix_ids"] == [[], [97, 98], []]
    assert made["prefix_chars"] == [0, 2, 0]
    assert made["row_index"] == [8, 7, 8]
    assert made["advantages"] == spans
    assert [keys for fields, keys in store.fetched if "responses" in fields] == [fetched]
