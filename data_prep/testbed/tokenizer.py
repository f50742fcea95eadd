r"""A byte-level tokenizer that survives `AutoTokenizer`: one token a byte, and the ChatML markers.

transformers 5 picks the tokenizer class by the *model type* next to it: beside a qwen2 config every tokenizer is loaded
as `Qwen2Tokenizer`, which replaces the saved normalizer and pre-tokenizer. So it is built as one from the start: a
byte-level BPE without merges. Token id = byte value, which also makes the newline the single token that verl's
continuous-token builder for Qwen asks for. `assert_round_trip` checks what was saved.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)

# The user's text, then one marker where the answer begins: 9 prompt tokens here. Every rendering without the generation
# prompt is a prefix of the rendering with more messages, and an assistant turn ends in `<|im_end|>\n`, as verl's
# QwenContinuousTokenBuilder expects.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{- '<|im_start|>' + message.content + '<|im_end|>\n' -}}"
    "{%- else -%}{{- message.content -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>' -}}{%- endif -%}"
)
PROBES = (
    "3agbhci=",
    "a4g8bAh8c0i0\\boxed{48A800}",
    "\n",
    "two  words,\n\n'tis 10 + 1\t= A?\r\n ",
    "".join(map(chr, range(32, 127))),
    f"3agbhci={START_OF_TURN}a4{END_OF_TURN}\n{END_OF_TEXT}",
)


def build_tokenizer(max_length: int = 128) -> Qwen2Tokenizer:
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        extra_special_tokens=[AddedToken(START_OF_TURN, special=True, normalized=False)],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_ids(tokenizer: Qwen2Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: Qwen2Tokenizer, content: str) -> list[int]:
    """The prompt exactly as verl's agent loop builds it."""
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def expected_ids(text: str) -> list[int]:
    """Token ids by definition, without any tokenizer: bytes, and the special tokens wherever they are written out."""
    for i, token in enumerate(SPECIAL_TOKENS):
        head, found, tail = text.partition(token)
        if found:
            return expected_ids(head) + [256 + i] + expected_ids(tail)
    return list(text.encode())


def assert_round_trip(folder: str | Path) -> Qwen2Tokenizer:
    """Load the tokenizer saved in `folder` the way verl does, and check that ids and texts are what they must be.

    `folder` must hold the model's config.json too: without it AutoTokenizer takes another path.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; save the model there first, or this check proves nothing.")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in (*PROBES, *SPECIAL_TOKENS):
        want, got = expected_ids(text), token_ids(tokenizer, text)
        if got != want:
            raise AssertionError(f"{folder}: {text!r} is tokenised as {got}, expected {want}.")
        if tokenizer.decode(got, skip_special_tokens=False) != text:
            raise AssertionError(f"{folder}: {text!r} is decoded as {tokenizer.decode(got)!r}.")
    want = expected_ids(PROBES[0] + START_OF_TURN)
    if prompt_ids(tokenizer, PROBES[0]) != want:
        raise AssertionError(f"{folder}: the chat template gives {prompt_ids(tokenizer, PROBES[0])}, expected {want}.")
    if (tokenizer.eos_token, tokenizer.pad_token) != (END_OF_TURN, END_OF_TEXT):
        raise AssertionError(f"{folder}: eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}.")
    return tokenizer
