r"""Find the answer in a text and bring it into one spelling. Pure string functions, linear in the length of the text.

An answer is the content of the last `\boxed{...}`, or, where the text has no box at all, what follows the last `####`.
Nothing else counts: guessing at "the answer is ..." rewards text that merely mentions the right number.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

#: characters of a box, of a `####` line or of a truth that are looked at; more is no answer
MAX_ANSWER_CHARS = 10_000

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_ESCAPE_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = "####"


def after_thinking(text: str) -> str | None:
    """What follows the last `</think>`; None if thinking was never closed, or opened again and left open.

    `<think>` itself may be missing: many chat templates put it into the prompt.
    """
    end = text.rfind("</think>")
    if end < 0 or text.find("<think>", end) >= 0:
        return None
    return text[end + len("</think>") :]


def final_answer(text: str) -> str | None:
    r"""The answer as written. None if there is none, it is empty, or the last box is never closed.

    The last box that was opened counts, so an inner box wins over the one around it, and a box cut off by the length
    limit is no answer even if an earlier one was complete.
    """
    box = _last_box(text)
    if box is not None:
        answer = _box_content(text, box)
    elif (start := text.rfind(_HASHES)) >= 0:
        start += len(_HASHES)
        line_end = text.find("\n", start)
        answer = text[start : line_end if line_end >= 0 else len(text)]
    else:
        return None
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return None
    return answer.strip() or None


def _last_box(text: str) -> int | None:
    r"""Position just behind the last box command (`\boxedminipage` and the like are other commands)."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    last = _BOX.match(text, start) if start >= 0 else None
    if start >= 0 and last is None:
        for last in _BOX.finditer(text):  # noqa: B007
            pass
    return last.end() if last else None


def _box_content(text: str, start: int) -> str | None:
    window = text[start : start + MAX_ANSWER_CHARS + 2].lstrip()
    if not window.startswith("{"):  # `\boxed 5`
        match = re.match(r"[^\s{}$]+", window)
        return match.group() if match else None
    depth = 0
    for match in _ESCAPE_OR_BRACE.finditer(window):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return window[1 : match.start()]
    return None


def true_answers(truth: Any) -> list[str]:
    r"""The accepted answers behind a `ground_truth` of any type, without the empty ones.

    A list (or a JSON list in a string, as in Skywork-OR1) holds alternatives: one of them suffices. A worked solution
    stands for its last box or `####`. Numbers are written out; None gives no answer.
    """
    if truth is None:
        return []
    if isinstance(truth, bytes):
        truth = truth.decode(errors="replace")
    if hasattr(truth, "tolist"):  # numpy arrays and scalars, as parquet readers return them
        truth = truth.tolist()
    if isinstance(truth, list | tuple | set | frozenset):
        return [answer for item in truth if not isinstance(item, list | tuple) for answer in true_answers(item)]
    text = str(truth).strip()
    if text.startswith("[") and text.endswith("]") and len(text) <= MAX_ANSWER_CHARS:
        # `["5"]` is a list of answers, `[0, 1]` an interval: only strings make a list of alternatives
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            items = []
        if items and all(isinstance(item, str) for item in items):
            return [answer for item in items for answer in true_answers(item)]
        if len(items) == 1 and isinstance(items[0], int | float):
            return [str(items[0])]
    if _last_box(text) is not None or _HASHES in text:
        text = final_answer(text) or ""
    return [text] if text and len(text) <= MAX_ANSWER_CHARS else []


# --- one spelling ---

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SYMBOLS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
    "×": "\\times ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "π": "\\pi ",
    "θ": "\\theta ",
    "∞": "\\infty ",
    "≤": "\\leq ",
    "≥": "\\geq ",
    "≠": "\\neq ",
    "±": "\\pm ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "°": "\\degree ",
    "…": "\\ldots ",
    "\u200b": "",
}
for _sign in map(chr, (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F))):  # vulgar fractions
    _top, _bottom = unicodedata.normalize("NFKC", _sign).split("⁄")
    _SYMBOLS[_sign] = f" \\frac{{{_top}}}{{{_bottom}}} "
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)
_ROOT = re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))")

# In this order. Braces of the patterns never nest, so each is linear.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:displaystyle|textstyle|limits|bigl?|bigr|Bigl?|Bigr|left|right)(?![a-zA-Z])\.?", ""),
        (r"\\[!]|\\hspace\{[^{}]*\}", ""),
        (r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|operatorname|mbox|rm)\s*\{", r"\\text{"),
        (r"\\text\{ ?([ei]) ?\}", r"\1"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\leqslant(?![a-zA-Z])|\\le(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\geqslant(?![a-zA-Z])|\\ge(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset "),
        (r"\{,\}", ","),
        (r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d\s}).])\s(?:and|or)\s(?=[\s\d\\(+.a-z-])", ","),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])", r"\\degree "),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\^\s*(\d)", r"^{\1}"),
        # `^{1}0` came from `^10`: models mean the whole number
        (r"\^\{(\d)\}(\d+)", r"^{\1\2}"),
        (r"\\%", "%"),
        (r"\s+", " "),
        # a blank means something only between letters and digits
        (r" (?![0-9A-Za-z])|(?<![0-9A-Za-z,]) ", ""),
        # ... and `1, 000` is a list, `1,000` a number
        (r", (?!\d{3}(?!\d))", ","),
    )
)
_EDGE = re.compile(r"^(?:\$\$?|\\\(|\\\[|\*\*|[\s=:]|\\approx(?![a-zA-Z]))+(?!$)")
_TAILS = ("$", "\\)", "\\]", "**", "\\\\")
_WHOLE_TEXT = re.compile(r"^\\text\{([^{}]*)\}$")
_MEMBER = re.compile(r"^[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")


def normalise(answer: str) -> str:
    r"""One spelling of an answer: ASCII LaTeX without layout commands, dollar signs, and redundant brackets.

    Keeps what can carry meaning: units, percent signs, letter case, and blanks between digits (`4 2` is not 42).
    """
    text = " ".join(answer[:MAX_ANSWER_CHARS].split())
    text = _SUPERSCRIPT_RUN.sub(lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOL_TABLE))
    text = _ROOT.sub(lambda match: "\\sqrt{" + next(group for group in match.groups() if group is not None) + "}", text)
    before = None
    for _ in range(8):  # wrappers may be wrapped again; a bound keeps odd input cheap
        if text == before:
            break
        before = text
        text = _EDGE.sub("", text) if not _is_currency(text) else text
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = _strip_tail(text)
        text = _MEMBER.sub("", text.strip())
        text = _WHOLE_TEXT.sub(r"\1", text).strip()
        text = strip_brackets(text)
    return text[1:] if re.match(r"\+\s*\d", text) else text


def _strip_tail(text: str) -> str:
    """Without closing dollar signs, emphasis, line breaks and full stops. Not a regex: those are quadratic here."""
    while True:
        text = text.rstrip(" .,;:")
        tail = next((tail for tail in _TAILS if text.endswith(tail) and not text.endswith("\\$")), None)
        if tail is None or (tail == "$" and "$" not in text[:-1] and text[-2:-1].isdigit()):
            return text
        text = text[: -len(tail)]


def _is_currency(text: str) -> bool:
    """`$36` with a single dollar sign is money, `$36$` is mathematics."""
    return text.startswith("$") and text.count("$") == 1


def strip_brackets(text: str) -> str:
    """Without the `( )` or `{ }` that enclose all of it, unless they make a tuple, an interval or a set."""
    if not text or text[0] not in "({":
        return text
    partner: dict[int, int] = {}
    stack: list[int] = []
    comma_depth = len(text)  # depth of the outermost comma
    for match in re.finditer(r"\\.|[(){}\[\],;]", text, re.DOTALL):
        mark, position = match.group(), match.start()
        if mark in ("(", "{", "[", "\\{"):
            stack.append(position)
        elif mark in (")", "}", "]", "\\}"):
            if not stack:
                return text
            partner[stack.pop()] = position
        elif mark in (",", ";"):
            comma_depth = min(comma_depth, len(stack))
    if stack:
        return text
    start, end = 0, len(text)
    while start < end and text[start] in "({" and partner[start] == end - 1:
        if comma_depth == start + 1 and text[start] == "(":
            break
        start, end = start + 1, end - 1
    return text[start:end]
