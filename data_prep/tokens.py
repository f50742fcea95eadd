"""Lengths in tokens, and whether a chat template opens the thinking itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_prep.convert import THINK_OPENER


def load(path: str) -> Any:
    """The policy's tokenizer.

    Raises:
        DataError: there is none at `path`.
    """
    from transformers import AutoTokenizer

    from data_prep.errors import DataError

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(path, "holds no tokenizer", "Give the folder or hub id of the model to train.") from error


def counter(tokenizer: Any) -> Callable[[list[str]], list[int]]:
    """A function that counts the tokens of texts, without special tokens added."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    # the ids of the Rust tokenizer are never made into Python lists: only their number is wanted
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def opens_thinking(tokenizer: Any) -> bool:
    """Whether a prompt rendered with the generation prompt already ends with `<think>`."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    turn = [{"role": "user", "content": "1+1?"}]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return rendered.rstrip().endswith(THINK_OPENER)
