"""The plugin's columns of the rollout log."""

from __future__ import annotations

import pytest
import torch

from verl_prefix.rollout_log import columns, delete_up_to, text_boundary


@pytest.mark.parametrize(
    ("output", "prefix", "characters"),
    [
        ("abcdef", "abc", 3),
        ("abc", "abc", 3),
        ("abc", "", 0),
        ("aéz", "a\ufffd", 1),  # cut inside a multi-byte character
        ("ab", "abc", 2),
    ],
)
def test_text_boundary(output, prefix, characters):
    assert text_boundary(output, prefix) == characters


def test_columns_follow_the_order_of_the_keys():
    step_columns = {
        "prefix_len": torch.tensor([0, 2, 0]),
        "real": torch.tensor([True, True, False]),
        "demo_index": torch.tensor([-1, 1, 1]),
        "demo_len": torch.tensor([0, 9, 9]),
        "ratio": torch.tensor([0.0, 0.25, 0.25]),
        "hit_limit": torch.tensor([True, False, False]),
        "trained": torch.tensor([False, True, False]),
    }
    log = columns(
        keys=["u_1_0", "u_0_0", "pad_0_0"],
        rows=[0, 1, 2],
        outputs=["ab", "cde", ""],
        prefix_ids=[[], [99, 100], []],
        row_index=[7, 7, 7],
        step_columns=step_columns,
        decode=lambda ids: "".join(map(chr, ids)),
    )
    assert log["role"] == ["on_policy", "prefixed", "padding"]
    assert log["group"] == ["u", "u", "pad"]
    assert log["session"] == [1, 0, 0]
    assert log["prefix_ids"] == [[], [99, 100], []]
    assert log["prefix_chars"] == [0, 2, 0]
    assert log["demo_index"] == [-1, 1, -1]
    assert log["demo_len"] == [0, 9, 0]
    assert log["hit_limit"] == [True, False, False]
    assert log["trained"] == [False, True, False]
    assert {len(values) for values in log.values()} == {3}


def test_old_steps_are_deleted_and_nothing_else(tmp_path):
    for name in ("1.jsonl", "9.jsonl", "10.jsonl", "11.jsonl", "notes.jsonl", "9.txt", "best9.jsonl"):
        (tmp_path / name).write_text("x")
    delete_up_to(tmp_path, 10)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["11.jsonl", "9.txt", "best9.jsonl", "notes.jsonl"]
