"""From the demonstration column of a row to token ids, and why a demonstration cannot be used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

#: A demonstration shorter than this cannot be cut into a prefix and at least one token to be found.
MIN_TOKENS = 2
_CACHED_TEXTS = 1024

UNUSABLE = {
    "not_a_string": "is not a string",
    "empty": "is empty",
    "too_short": f"has fewer than {MIN_TOKENS} tokens",
    "too_long": "does not fit the response limit with its EOS",
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
        self.tokenised = 0

    def classify(self, demonstration: Any) -> tuple[int, ...] | str:
        """The demonstration's ids, or the key in `UNUSABLE` that says why there are none. Never raises."""
        if not isinstance(demonstration, str):
            return "not_a_string"
        if demonstration in self._cache:
            self._cache.move_to_end(demonstration)
            return self._cache[demonstration]
        result = self._tokenise(demonstration)
        self._cache[demonstration] = result
        if len(self._cache) > _CACHED_TEXTS:
            self._cache.popitem(last=False)
        return result

    def usable(self, cell: Any) -> list[tuple[int, ...]]:
        """Ids of the usable demonstrations in a cell, in their order."""
        return [ids for ids in map(self.classify, as_list(cell)) if not isinstance(ids, str)]

    def _tokenise(self, text: str) -> tuple[int, ...] | str:
        if not text.strip():
            return "empty"
        self.tokenised += 1
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        while ids and ids[-1] in self._special:
            ids.pop()
        if self._special.intersection(ids):
            return "special_token"
        if len(ids) < MIN_TOKENS:
            return "too_short"
        if len(ids) + 1 > self.response_length:
            return "too_long"
        return tuple(ids)
