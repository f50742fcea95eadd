"""The plugin's columns of the rollout log."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_prefix.rollout_log import MOST_SPANS, advantage_spans, columns, delete_up_to, text_boundary


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
        "row_index": [7, 8, 8],
        "group": ["u", "u", "pad"],
        "session": [1, 0, 0],
        "demo_index": torch.tensor([-1, 1, 1]),
        "demo_len": torch.tensor([0, 9, 9]),
        "ratio": torch.tensor([0.0, 0.25, 0.25]),
        "hit_limit": torch.tensor([True, False, False]),
        "trained": torch.tensor([False, True, False]),
        "advantages": [torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.25, 0.25]), torch.zeros(0)],
    }
    log = columns(
        rows=[0, 1, 2],
        outputs=["ab", "cde", ""],
        response_ids=[[], [99, 100, 101], []],
        step_columns=step_columns,
        decode=lambda ids: "".join(map(chr, ids)),
    )
    assert log["role"] == ["on_policy", "prefixed", "padding"]
    assert log["group"] == ["u", "u", "pad"]
    assert log["session"] == [1, 0, 0]
    assert log["row_index"] == [7, 8, 8]
    assert log["prefix_ids"] == [[], [99, 100], []]
    assert log["prefix_chars"] == [0, 2, 0]
    assert log["demo_index"] == [-1, 1, -1]
    assert log["demo_len"] == [0, 9, 0]
    assert log["hit_limit"] == [True, False, False]
    assert log["trained"] == [False, True, False]
    assert log["advantages"] == [[[2, 0.5]], [[1, 0.0], [3, 0.25]], []]
    assert {len(values) for values in log.values()} == {3}


class ByteTokenizer:
    """A token is a byte of UTF-8; byte 0 is a special token, which a decoded text has not."""

    def __call__(self, ids):
        return bytes(i for i in ids if i).decode(errors="replace")


class StrippingTokenizer:
    """A token is a character; what is decoded loses a space at its head."""

    def __call__(self, ids):
        return "".join(map(chr, ids)).removeprefix(" ")


@given(st.text(alphabet="ab é漢𝟜", max_size=12), st.data())
def test_spans_of_advantages_end_where_their_tokens_do(text, data):
    ids = [*text.encode(), 0]
    advantages = data.draw(st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=len(ids), max_size=len(ids)))
    decode = ByteTokenizer()
    spans = advantage_spans(advantages, text, ids, lambda token: decode([token]), decode)
    assert [end for end, _ in spans] == sorted({end for end, _ in spans})
    assert (spans[-1][0] if spans else 0) == len(text)
    shown = [
        value for (begin, _), (end, value) in zip([(0, 0), *spans], spans, strict=False) for _ in range(end - begin)
    ]
    at = 0
    for character, value in zip(text, shown, strict=True):
        size = len(character.encode())
        assert value in advantages[at : at + size]  # of one of the character's tokens
        at += size


def test_spans_of_a_tokenizer_that_drops_a_leading_space():
    ids = list(map(ord, "ab cd e"))
    decode = StrippingTokenizer()
    spans = advantage_spans([0, 0, 1, 1, 1, 2, 2], "ab cd e", ids, lambda token: decode([token]), decode)
    assert spans == [[2, 0], [5, 1], [7, 2]]


def test_more_spans_than_a_log_has_room_for_are_left_out():
    many = MOST_SPANS + 1
    text, ids = "a" * many, [97] * many
    assert advantage_spans(range(many), text, ids, chr, None) == []
    assert len(advantage_spans(range(many - 1), text[1:], ids[1:], chr, None)) == MOST_SPANS
    apart = advantage_spans(range(many - 1), "b" * many, ids[1:], chr, None)
    assert apart == [], "decoding so many prefixes of the text would hold the trainer up"


def test_one_advantage_needs_no_tokens():
    assert advantage_spans([0.123456789] * 3, "abc", [], None, None) == [[3, 0.12346]]
    assert advantage_spans([], "abc", [], None, None) == []
    assert advantage_spans([1.0], "", [], None, None) == []


def test_old_steps_are_deleted_and_nothing_else(tmp_path):
    for name in ("1.jsonl", "9.jsonl", "10.jsonl", "11.jsonl", "notes.jsonl", "9.txt", "best9.jsonl"):
        (tmp_path / name).write_text("x")
    delete_up_to(tmp_path, 10)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["11.jsonl", "9.txt", "best9.jsonl", "notes.jsonl"]
