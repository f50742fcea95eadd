"""Demonstrations that are odd: each has one defined outcome, and none raises."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_prefix.demonstrations import DemonstrationTokenizer, as_list, offered
from verl_prefix.exceptions import PrefixConfigError


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


def test_a_text_far_beyond_the_limit_is_not_tokenised_whole(tokenizer, monkeypatch):
    lengths = []
    encode = tokenizer.tokenizer.encode
    monkeypatch.setattr(tokenizer.tokenizer, "encode", lambda text, **kwargs: lengths.append(len(text)) or encode(text))
    assert tokenizer.classify("a" * 100_000) == "too_long"
    assert max(lengths) < 1000
    assert tokenizer.classify("abc" + "$" * 1000) == tuple(map(ord, "abc"))


def test_cache_is_bounded_and_forgets_the_oldest(tokenizer, monkeypatch):
    monkeypatch.setattr("verl_prefix.demonstrations._CACHED_TEXTS", 2)
    for text in ("aaa", "bbb", "aaa", "ccc", "aaa"):
        tokenizer.classify(text)
    assert tokenizer.tokenizer.calls == 3
    tokenizer.classify("bbb")
    assert tokenizer.tokenizer.calls == 4


@pytest.mark.parametrize(
    ("marks", "left"),
    [(None, "abc"), ([], "abc"), ([True, False, True], "ac"), ([False], "bc"), ([None, True, False], "ab")],
)
def test_what_is_marked_wrong_is_not_offered(marks, left):
    assert offered(["a", "b", "c"], marks) == list(left)
    assert offered(np.array(["a", "b", "c"], dtype=object), None if marks is None else np.array(marks)) == list(left)


# --- steps ---


@pytest.fixture
def byte_level():
    """A byte-level BPE, as the models' own, with three merges: `bc`, `.` and a newline, é's two bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "c"), (".", "Ċ"), ("Ã", "©")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges), "<eos>"])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return DemonstrationTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>"), 64)


def prefixes(tokenizer, text, ends):
    """What the tokens up to each end spell."""
    (ids,), (lens,) = tokenizer.usable(text), tokenizer.step_lens(text, [ends])
    return [tokenizer.tokenizer.decode(ids[:n]) for n in lens]


def test_steps_end_on_tokens(byte_level):
    assert prefixes(byte_level, "a.\nd.\nx", [3, 6, 7]) == ["a.\n", "a.\nd.\n", "a.\nd.\nx"]


def test_a_token_over_the_end_of_a_step_stays_out(byte_level):
    assert prefixes(byte_level, "abcd", [2, 3]) == ["a", "abc"]
    assert prefixes(byte_level, "a.\nd", [2]) == ["a"]


def test_characters_of_several_bytes_are_not_cut(byte_level):
    text = "é∑é∑"  # one token, three tokens, and again
    assert byte_level.step_lens(text, [[1, 2, 3, 4]]) == [(1, 4, 5, 8)]
    assert prefixes(byte_level, text, [1, 2, 3, 4]) == ["é", "é∑", "é∑é", "é∑é∑"]


def test_ends_outside_of_the_text_are_harmless(byte_level):
    assert byte_level.step_lens("abcd", [[0, 99]]) == [(0, 3)]
    assert byte_level.step_lens("abcd<eos>", [[2, 9]]) == [(1, 3)], "the dropped EOS is in no step"


def test_steps_stay_with_their_demonstration(byte_level):
    cell, steps = ["ad", "a", 7, "da", "dd"], [[1], [1], [1], [], None]
    assert byte_level.step_lens(cell, steps) == [(1,), (), ()], "those of the usable ones"
    assert byte_level.step_lens(np.array(cell, dtype=object), np.array([np.array([1])], dtype=object)) == [(1,), (), ()]
    assert byte_level.step_lens(["ad", "da"], None) == [(), ()]


def test_steps_of_marked_demonstrations_leave_with_them():
    assert offered([[1, 2], [3], []], [True, False, True]) == [[1, 2], []]


def test_a_slow_tokenizer_cannot_tell_steps(tokenizer):
    assert tokenizer.step_lens(["abc"], [[]]) == [()], "nothing to tell"
    with pytest.raises(PrefixConfigError, match="prefix.sampling.at_steps"):
        tokenizer.step_lens(["abc"], [[1, 3]])
