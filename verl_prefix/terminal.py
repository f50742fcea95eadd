"""Text from data files and models on a terminal: it is untrusted, and often long."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """`text` with what could steer a terminal or hide from the eye spelled out (model text is untrusted)."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def elide(text: str, head: int, tail: int) -> str:
    """The first `head` and the last `tail` characters, and how many are left out between them."""
    left_out = len(text) - head - tail
    return text if left_out <= 0 else f"{text[:head]} [... {left_out} characters ...] {text[len(text) - tail :]}"
