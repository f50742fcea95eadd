"""The policy's tokenizer, without importing verl."""

from __future__ import annotations

from typing import Any

from verl_prefix.exceptions import PrefixConfigError


def load(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model folder or under a hub id, as verl loads it (without remote code unless asked).

    Raises:
        PrefixConfigError: there is none.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub client raise a dozen kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise PrefixConfigError(
            "--tokenizer", path, f"no tokenizer there ({reason}). Name the model's folder or its id on the hub."
        ) from error
