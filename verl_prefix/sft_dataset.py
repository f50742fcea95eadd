"""SFT examples with RL's token ids: the prompt as the agent loop builds it, the demonstration, EOS.

verl's `MultiTurnSFTDataset` renders whole conversations with the chat template. What that puts around an answer is
not what the policy sees in RL: a newline after `<|im_end|>`, an end token other than the tokenizer's EOS, stripped or
merged white space where the answer begins. Here both phases of SFT -> RL see the same ids.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.fs import copy_to_local
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder

from verl_prefix.demonstrations import UNUSABLE, DemonstrationTokenizer, offered
from verl_prefix.exceptions import DemonstrationError, PrefixConfigError


class DemonstrationDataset(Dataset):
    """One example per usable demonstration, selected by `data.custom_cls` in verl's SFT trainers.

    Reads RL's training file (`data.prompt_key`, `data.demos_key`) or, where it has no such columns, single-turn
    conversations (`data.messages_key`). Everything is tokenised once, at the start. Demonstrations that RL could not
    use either, or that do not fit `data.max_length` with prompt and EOS, are left out and counted: cut ones would
    teach the policy not to stop.

    Args:
        parquet_files: one file or several.
        tokenizer: the policy's.
        config: verl's `data` section with the keys of `+sft=sft`.
        processor: unused; text only.
        max_samples: keep the first so many examples; -1 keeps all.

    Raises:
        DemonstrationError: a file whose rows cannot be used; names file, row and mend.
        PrefixConfigError: `data.truncation` or `data.pad_mode` asks for something else.
    """

    def __init__(self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1):
        if config.truncation != "error":
            mend = "a cut demonstration has no EOS; leave it at error. Those that are too long are left out."
            raise PrefixConfigError("data.truncation", config.truncation, mend)
        if config.pad_mode != DatasetPadMode.NO_PADDING:
            raise PrefixConfigError("data.pad_mode", config.pad_mode, "leave it at no_padding.")
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        encode = _Encoder(tokenizer, config.max_length, config.get("apply_chat_template_kwargs") or {})
        self._examples: list[tuple[np.ndarray, int]] = []
        left_out: Counter = Counter()
        for file in files:
            for prompt, demonstration in read_examples(copy_to_local(file), config):
                encoded = encode(prompt, demonstration)
                if isinstance(encoded, str):
                    left_out[encoded] += 1
                else:
                    self._examples.append(encoded)
        _report(files, self._examples, left_out)
        order = np.random.default_rng(config.get("seed", 0)).permutation(len(self._examples))
        self._examples = [self._examples[i] for i in order][: max_samples if max_samples > 0 else None]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `position_ids` and `loss_mask` (1 on the demonstration and its EOS), each (tokens,) int64."""
        ids, prompt_len = self._examples[item]
        positions = torch.arange(len(ids))
        return {
            "input_ids": torch.from_numpy(ids).long(),
            "position_ids": positions,
            "loss_mask": (positions >= prompt_len).long(),
        }


class _Encoder:
    def __init__(self, tokenizer: Any, max_length: int, chat_template_kwargs: dict[str, Any]):
        self.max_length, self.eos = max_length, tokenizer.eos_token_id
        self.prompts = ContinuousTokenBuilder(tokenizer, chat_template_kwargs=dict(chat_template_kwargs))
        self.demonstrations = DemonstrationTokenizer(tokenizer, max_length)

    def __call__(self, prompt: list[dict[str, str]], demonstration: Any) -> tuple[np.ndarray, int] | str:
        """(ids, prompt length), or the key in `UNUSABLE` that says why there are none."""
        answer = self.demonstrations.classify(demonstration)
        if isinstance(answer, str):
            return answer
        prompt_ids = list(self.prompts.build_initial_tokens(prompt))
        ids = np.array([*prompt_ids, *answer, self.eos], dtype=np.int32)
        return (ids, len(prompt_ids)) if len(ids) <= self.max_length else "too_long"


def read_examples(file: str, config: Any) -> Iterator[tuple[list[dict[str, str]], Any]]:
    """(prompt messages, demonstration) for each demonstration in a parquet file, read in batches."""
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    in_rl_format = config.demos_key in names and config.prompt_key in names
    if not in_rl_format and config.messages_key not in names:
        raise DemonstrationError(
            f"{file}: has neither {config.prompt_key!r} and {config.demos_key!r} (RL's training file) nor "
            f"{config.messages_key!r} (conversations). Name the columns with data.prompt_key, data.demos_key or "
            "data.messages_key."
        )
    marks = [name for name in (config.demos_correct_key,) if name in names]
    columns = [config.prompt_key, config.demos_key, *marks] if in_rl_format else [config.messages_key]
    rows = (row for batch in parquet.iter_batches(batch_size=256, columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        if in_rl_format:
            shown = offered(row[config.demos_key], row.get(config.demos_correct_key))
            yield from ((row[config.prompt_key], demonstration) for demonstration in shown)
        else:
            yield _split(row[config.messages_key], f"{file}: row {number}, {config.messages_key}")


def _split(messages: list[dict[str, str]], where: str) -> tuple[list[dict[str, str]], str]:
    roles = [message["role"] for message in messages or []]
    if len(roles) < 2 or roles[-1] != "assistant" or "assistant" in roles[:-1]:
        raise DemonstrationError(
            f"{where} has the roles {roles}; only a prompt and one assistant turn behind it can be trained on here. "
            "verl's own dataset takes more turns: data.custom_cls.path=null."
        )
    return messages[:-1], messages[-1]["content"]


def _report(files: list[str], examples: list[tuple[np.ndarray, int]], left_out: Counter) -> None:
    why = ", ".join(f"{count} {UNUSABLE[reason]}" for reason, count in left_out.most_common())
    if not examples:
        raise DemonstrationError(
            f"{', '.join(files)}: no demonstration can be trained on ({why or 'every cell is empty'}). Raise "
            "data.max_length or mend the file."
        )
    if os.environ.get("RANK", "0") == "0":
        trained = sum(len(ids) - prompt_len for ids, prompt_len in examples)
        left = f"; left out: {why} (data.max_length limits prompt, demonstration and EOS)" if why else ""
        print(f"[verl_prefix] SFT: {len(examples)} demonstrations, {trained} trained tokens{left}", flush=True)
