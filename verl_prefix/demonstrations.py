"""From the demonstration column of a row to token ids, and why a demonstration cannot be used."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, zip_longest
from typing import Any

from verl_prefix.exceptions import PrefixConfigError

#: A demonstration shorter than this cannot be cut into a prefix and at least one token to be found.
MIN_TOKENS = 2
_CACHED_TEXTS = 1024
#: characters per token of the limit from which on a text is judged by its head: to tokenise 10 MB takes gigabytes
_HEAD = 16

UNUSABLE = {
    "not_a_string": "is not a string",
    "empty": "is empty",
    "too_short": f"has fewer than {MIN_TOKENS} tokens",
    "too_long": "does not fit the response limit with its EOS",
    "not_tokenised": "makes the tokenizer raise an error",
    "special_token": "contains a special token of the chat template before its end",
}


def as_list(cell: Any) -> list[Any]:
    """The demonstrations in one cell of the column: a list from a list, tuple or array; [] from None.

    A single string counts as one demonstration.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        return [cell]
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    return list(cell) if isinstance(cell, Sequence) else [cell]


def offered(cell: Any, marks: Any = None) -> list[Any]:
    """The demonstrations of a row, or what belongs to each of them, but for those that are marked wrong.

    Args:
        cell: the row's demonstrations, see `as_list`; or its steps, one entry per demonstration.
        marks: the row's `demos_correct`: one bool each; None, [] or too short leaves the others in.
    """
    demonstrations, marks = as_list(cell), as_list(marks)
    return [text for i, text in enumerate(demonstrations) if i >= len(marks) or marks[i] is None or bool(marks[i])]


class DemonstrationTokenizer:
    """Token ids of demonstrations, each text tokenised once (least recently used texts are forgotten).

    A demonstration is tokenised alone, without special tokens added: the prompt's ids end where the response begins, so
    cutting and joining happens on ids and never on text. A trailing EOS or other special token is dropped, since
    the policy has to produce its own. One inside makes the demonstration unusable: it would end the response there.

    Args:
        tokenizer: the policy's tokenizer.
        response_length: limit of a response in tokens, EOS included.
    """

    def __init__(self, tokenizer: Any, response_length: int):
        self.tokenizer = tokenizer
        self.response_length = response_length
        # `all_special_ids` has the named ones only; Llama-3's <|eot_id|> is special without a name of its own.
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._cache: OrderedDict[str, tuple[int, ...] | str] = OrderedDict()
        self._ends: OrderedDict[str, list[int]] = OrderedDict()
        self.tokenised = 0

    def classify(self, demonstration: Any) -> tuple[int, ...] | str:
        """The demonstration's ids, or the key in `UNUSABLE` that says why there are none. Never raises."""
        if not isinstance(demonstration, str):
            return "not_a_string"
        if demonstration in self._cache:
            self._cache.move_to_end(demonstration)
            return self._cache[demonstration]
        try:
            result = self._tokenise(demonstration)
        except Exception:  # lone surrogates, say; raised here it would cost the rollout
            result = "not_tokenised"
        self._cache[demonstration] = result
        if len(self._cache) > _CACHED_TEXTS:
            self._cache.popitem(last=False)
        return result

    def usable(self, cell: Any) -> list[tuple[int, ...]]:
        """Ids of the usable demonstrations in a cell, in their order."""
        return [ids for ids in map(self.classify, as_list(cell)) if not isinstance(ids, str)]

    def step_lens(self, cell: Any, steps: Any) -> list[tuple[int, ...]]:
        """For each usable demonstration in a cell the tokens up to the end of each of its steps; () without steps.

        A token that reaches over the end of a step is not in it: the cut is on ids, before that token.

        Args:
            cell: see `usable`.
            steps: one entry per demonstration of the cell: the ends of its steps in characters. None, or fewer
                entries, leaves demonstrations without steps.

        Raises:
            PrefixConfigError: the tokenizer does not tell which characters a token covers.
        """
        pairs = zip_longest(as_list(cell), as_list(steps))
        return [
            tuple(bisect_right(self._token_ends(text), end) for end in as_list(ends)) if as_list(ends) else ()
            for text, ends in pairs
            if not isinstance(self.classify(text), str)
        ]

    def require_offsets(self) -> None:
        """Raises:
        PrefixConfigError: the tokenizer does not tell which characters a token covers, as `step_lens` needs it.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise PrefixConfigError(
                "prefix.sampling.at_steps",
                True,
                "finds the steps by a fast tokenizer's character offsets, and the policy's tokenizer is a slow one. "
                "Set it to false, which cuts by tokens.",
            )

    def _token_ends(self, text: str) -> list[int]:
        """Ends of a usable text's tokens in characters, ascending."""
        self.require_offsets()
        if text not in self._ends:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in found["offset_mapping"]][: len(self.classify(text))]
            self._ends[text] = list(accumulate(ends, max))
            if len(self._ends) > _CACHED_TEXTS:
                self._ends.popitem(last=False)
        return self._ends[text]

    def _tokenise(self, text: str) -> tuple[int, ...] | str:
        if not text.strip():
            return "empty"
        self.tokenised += 1
        head = text[: _HEAD * self.response_length]
        if len(head) < len(text):
            kept = sum(i not in self._special for i in self._encode(head))
            if kept > 2 * self.response_length:
                return "too_long"
        ids = self._encode(text)
        while ids and ids[-1] in self._special:
            ids.pop()
        if self._special.intersection(ids):
            return "special_token"
        if len(ids) < MIN_TOKENS:
            return "too_short"
        if len(ids) + 1 > self.response_length:
            return "too_long"
        return tuple(ids)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
