"""Demonstrations that are odd: each has one defined outcome, and none raises."""

from __future__ import annotations

import numpy as np
import pytest

from verl_prefix.demonstrations import DemonstrationTokenizer, as_list


class CharTokenizer:
    """One token per character; `$` is the EOS and `@` a role marker, both special."""

    eos_token_id = ord("$")
    all_special_ids = [ord("$"), ord("@")]

    def __init__(self):
        self.calls = 0

    def encode(self, text, add_special_tokens=False):
        assert not add_special_tokens
        self.calls += 1
        return [ord(c) for c in text]


@pytest.fixture
def tokenizer():
    return DemonstrationTokenizer(CharTokenizer(), response_length=8)


@pytest.mark.parametrize(
    ("demonstration", "outcome"),
    [
        ("abc", tuple(map(ord, "abc"))),
        ("abc$", tuple(map(ord, "abc"))),  # its EOS is the policy's to produce
        ("abc@$", tuple(map(ord, "abc"))),
        ("a$bc", "special_token"),
        ("@abc", "special_token"),
        ("", "empty"),
        (" \n", "empty"),
        ("a", "too_short"),
        ("$$", "too_short"),
        ("abcdefg", tuple(map(ord, "abcdefg"))),  # 7 and an EOS just fit 8
        ("abcdefgh", "too_long"),
        (3, "not_a_string"),
        (None, "not_a_string"),
        (["abc"], "not_a_string"),
        (b"abc", "not_a_string"),
    ],
)
def test_outcome(tokenizer, demonstration, outcome):
    assert tokenizer.classify(demonstration) == outcome


@pytest.mark.parametrize(
    ("cell", "demonstrations"),
    [
        (None, []),
        ([], []),
        ("abc", ["abc"]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (7, [7]),
    ],
)
def test_cells_of_any_container(cell, demonstrations):
    assert as_list(cell) == demonstrations


def test_special_tokens_without_a_name_count_too(tokenizer):
    """Llama-3's role markers are special tokens that `all_special_ids` does not list."""
    from types import SimpleNamespace

    inner = CharTokenizer()
    inner.added_tokens_decoder = {ord("#"): SimpleNamespace(special=True), ord("b"): SimpleNamespace(special=False)}
    marked = DemonstrationTokenizer(inner, response_length=8)
    assert marked.classify("a#b") == "special_token"
    assert marked.classify("abc#") == tuple(map(ord, "abc"))
    assert tokenizer.classify("a#b") == tuple(map(ord, "a#b"))


def test_usable_keeps_order_and_drops_the_rest(tokenizer):
    assert tokenizer.usable(["abc", 3, "", "xyz$", "a$b"]) == [tuple(map(ord, "abc")), tuple(map(ord, "xyz"))]


def test_a_text_is_tokenised_once(tokenizer):
    for _ in range(5):
        tokenizer.usable(["abc", "abd"])
    assert tokenizer.tokenizer.calls == 2


def test_cache_is_bounded_and_forgets_the_oldest(tokenizer, monkeypatch):
    monkeypatch.setattr("verl_prefix.demonstrations._CACHED_TEXTS", 2)
    for text in ("aaa", "bbb", "aaa", "ccc", "aaa"):
        tokenizer.classify(text)
    assert tokenizer.tokenizer.calls == 3
    tokenizer.classify("bbb")
    assert tokenizer.tokenizer.calls == 4
