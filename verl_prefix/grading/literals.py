r"""Answers that need no algebra: exact values of written numbers, units, choice letters, words.

`decide` settles most answers of real data in microseconds; only what is left goes to a worker process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from verl_prefix.grading.answers import normalise

#: a decimal stands for a value that it only approximates if it shows at least so many digits
MIN_APPROXIMATION_DIGITS = 6
_MAX_DIGITS = 400
_MAX_EXPONENT = 400

_GROUPED = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+"
_INTEGER = rf"(?:{_GROUPED}|\d+)"
_DECIMAL = re.compile(rf"(?P<whole>{_INTEGER}|)(?:\.(?P<places>\d+))?\.?")
_REPEATING = re.compile(r"(?P<whole>\d*)\.(?P<lead>\d*)\\overline\{(?P<cycle>\d+)\}")
_FRACTION = re.compile(r"\\frac\{(?P<top>[^{}]+)\}\{(?P<bottom>[^{}]+)\}")
_SLASH = re.compile(r"(?P<top>[^/]+)/(?P<bottom>[^/]+)")
_MIXED = re.compile(r"(?P<whole>\d+)(?: ?(?P<frac>\\frac\{\d+\}\{\d+\})| (?P<slash>\d+/\d+))")
_POWER = re.compile(r"(?P<base>\d+|\(-?\d+\))(?:\^|\*\*)(?:\{\(?(?P<braced>-?\d+)\)?\}|(?P<bare>-?\d+))")
_SCIENTIFIC = re.compile(
    r"(?P<lead>[\d.,]+)(?:(?:\\times|\\cdot|\*)10(?:\^|\*\*)\{?(?P<times>[+-]?\d+)\}?|[eE](?P<e>[+-]?\d+))"
)


@dataclass(frozen=True)
class Literal:
    """A written number: its exact value, and how many digits it shows if it is a decimal (else None)."""

    value: Fraction
    places: int | None = None
    digits: int | None = None

    @property
    def tolerance(self) -> Fraction | None:
        """One unit of the last digit of a decimal precise enough to stand for what it approximates, else None."""
        if self.places is None or min(self.places, self.digits or 0) < MIN_APPROXIMATION_DIGITS:
            return None
        return Fraction(1, 10**self.places)


def literal(text: str) -> Literal | None:
    r"""The value of a number like `-1,000.5`, `\frac{1}{2}`, `1/2`, `1\frac{1}{2}`, `2^{10}` or `1.2\times10^{3}`."""
    sign, text = _split_sign(text)
    if not text or len(text) > _MAX_DIGITS or not (text[0].isdigit() or text[0] in ".\\("):
        return None
    number = _decimal(text)
    if number is None:
        values = (read(text) for read in (_mixed, _fraction, _power, _repeating))
        value = next((value for value in values if value is not None), None)
        number = None if value is None else Literal(value)
    return number and Literal(sign * number.value, number.places, number.digits)


def _split_sign(text: str) -> tuple[int, str]:
    if text.startswith("-"):
        return -1, text[1:].lstrip()
    return 1, text


def _decimal(text: str) -> Literal | None:
    match = _DECIMAL.fullmatch(text)
    if not match or not (match["whole"] or match["places"]):
        return None
    whole = match["whole"].replace(",", "").replace(" ", "")
    if match["places"] is None:
        return Literal(Fraction(int(whole)))
    shown = (whole + match["places"]).lstrip("0")
    return Literal(Fraction(f"{whole or 0}.{match['places']}"), len(match["places"]), len(shown))


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    if not match:
        return None
    parts = []
    for part in (match["top"], match["bottom"]):
        sign, digits = _split_sign(part)
        number = _decimal(digits)
        if number is None:
            return None
        parts.append(sign * number.value)
    return parts[0] / parts[1] if parts[1] else None


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    part = match and _fraction(match["frac"] or match["slash"])
    return Fraction(int(match["whole"])) + part if part is not None and match else None


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text)
    if not match:
        return None
    lead, cycle = match["lead"], match["cycle"]
    repeated = Fraction(int(cycle), 10 ** len(cycle) - 1)
    return Fraction(int(match["whole"] or 0)) + (int(lead or 0) + repeated) / 10 ** len(lead)


def _power(text: str) -> Fraction | None:
    if match := _SCIENTIFIC.fullmatch(text):
        lead, exponent = _decimal(match["lead"]), int(match["times"] or match["e"])
        return lead.value * Fraction(10) ** exponent if lead and abs(exponent) <= _MAX_EXPONENT else None
    if match := _POWER.fullmatch(text):
        base, exponent = int(match["base"].strip("()")), match["braced"] or match["bare"]
        if len(exponent) > 4 or abs(int(exponent)) > _MAX_EXPONENT or len(match["base"]) > 6:
            return None
        return Fraction(base) ** int(exponent) if base or int(exponent) > 0 else None
    return None


def same_number(one: Literal, other: Literal) -> bool:
    """Equal values; or a decimal of six or more digits, within one unit of its last digit of the other value.

    Of two decimals the coarser one is the approximation.
    """
    if one.value == other.value:
        return True
    tolerances = [number.tolerance for number in (one, other) if number.places is not None]
    return bool(tolerances) and None not in tolerances and abs(one.value - other.value) < max(tolerances)


# --- units ---

_ALIASES = {
    name: unit
    for unit, names in {
        "dollar": "$ dollar usd",
        "cent": "cent ¢",
        "euro": "euro €",
        "pound": "pound £ lb lbs",
        "percent": "percent percentage pct",
        "degree": "degree deg °",
        "m": "m meter metre",
        "cm": "cm centimeter centimetre",
        "mm": "mm millimeter millimetre",
        "km": "km kilometer kilometre",
        "in": "in inch inches",
        "ft": "ft foot feet",
        "mi": "mi mile",
        "yd": "yd yard",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "g": "g gram",
        "kg": "kg kilogram",
        "l": "l liter litre",
        "ml": "ml milliliter millilitre",
        "mph": "mph milesperhour",
        "km/h": "km/h kmh kph kmperhour",
        "m/s": "m/s mps",
        "unit": "unit",
    }.items()
    for name in names.split()
}
_BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "sixteen": "16",
}
_POWER_TAIL = r"(?:\^\{?(?P<power>[23])\}?)?"
_TEXT_UNIT = re.compile(r"(?P<value>.*(?:[\d})]|\\pi))\s*\\text\{(?P<unit>[^{}]*)\}" + _POWER_TAIL)
_PLAIN_UNIT = re.compile(r"(?P<value>-?[\d.,/ ]*\d) ?(?P<unit>[A-Za-z][A-Za-z/ .]*)" + _POWER_TAIL)
_DEGREE = re.compile(r"(?P<value>.*[\d})])\\degree *(?P<scale>[CF]?)")
_BASE = re.compile(r"(?P<value>[0-9A-F]+)_\{?(?:\\text\{)?(?P<base>[a-z]+|\d+)\}{0,2}")
_CURRENCY = re.compile(r"(?P<minus>-?)(?P<unit>\\?\$|€|£|¢)(?P<value>.+)|(?P<back>.*\d)(?P<unit_back>\\?\$|€|£|¢)")


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of a normalised answer; the unit is "" where there is none.

    Units are `\text{...}` behind a number, known units and words of four or more letters behind a plain number,
    currency signs, degrees and the base of a numeral. The percent sign is kept in the value: it can change it.
    """
    if match := _CURRENCY.fullmatch(text):
        value = match["value"] if match["unit"] else match["back"]
        return (match["minus"] or "") + value, _unit((match["unit"] or match["unit_back"]).lstrip("\\"))
    if match := _BASE.fullmatch(text):
        return match["value"], "base " + _BASES.get(match["base"], match["base"])
    if match := _DEGREE.fullmatch(text):
        return match["value"], "degree" + match["scale"]
    if (match := _TEXT_UNIT.fullmatch(text)) and not _names_a_number(match["unit"]):
        unit = _unit(match["unit"], match["power"])
        return (match["value"] + "%", "") if unit == "percent" else (match["value"], unit)
    if match := _PLAIN_UNIT.fullmatch(text):
        unit = _unit(match["unit"], match["power"])
        if unit == "percent":
            return match["value"] + "%", ""
        word = re.sub(r"[^A-Za-z]", "", match["unit"])
        known = unit.split("^")[0] in _ALIASES.values()
        # `5m^2` may be a variable squared; `5 m^2`, with a space, is an area
        spaced = match["power"] and text[len(match["value"])] == " "
        if len(word) >= 4 or (known and (len(word) >= 2 or spaced)):
            return match["value"], unit
    return text, ""


def _names_a_number(unit: str) -> bool:
    """`(or 6)` is a second answer, not a unit; `m^2` is one."""
    return re.search(r"\d", re.sub(r"\^\{?[23]\}?", "", unit)) is not None


def _unit(text: str, power: str | None = None) -> str:
    name = text.strip().strip(".").lower()
    for prefix, exponent in (("square ", "2"), ("sq ", "2"), ("sq. ", "2"), ("cubic ", "3")):
        if name.startswith(prefix):
            name, power = name[len(prefix) :], exponent
    name = re.sub(r"\^\{?([23])\}?$", "", name) if (found := re.search(r"\^\{?([23])\}?$", name)) else name
    power = found.group(1) if found else power
    name = name.replace(" ", "")
    for candidate in (name, name.removesuffix("s")):
        if candidate in _ALIASES:
            name = _ALIASES[candidate]
            break
    else:
        name = name.removesuffix("s")
    return f"{name}^{power}" if power else name


# --- decisions ---

_CHOICE = re.compile(r"[A-J]")
_CHOICE_ANSWER = re.compile(r"(?:\\text\{)?(?:\((?P<bracketed>[A-J])\)|(?P<plain>[A-J])(?=[).:}]|$))")
#: a further choice behind the first one: `(A)(B)`, `A. B.`, `(A) or (B)`
_ANOTHER_CHOICE = re.compile(r"\(([A-J])\)|(?<![A-Za-z\\])([A-J])(?:[).:]|$)|(?:,|/|\b(?:or|and))\s*\(?([A-J])\b")
# to math-verify `4 2` is a product
_LOOSE_DIGITS = re.compile(r"-?[\d.]+(?: [\d.]+)+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '\-]*")
_SHORT_WORDS = frozenset(["yes", "no", "on", "off", "odd", "all", "not", "or", "and", "is", "in", "if"])


@dataclass(frozen=True)
class Question:
    """What is left to compare by algebra: normalised LaTeX without units."""

    answer: str
    truth: str


def decide(answer: str, truth: str) -> bool | Question:
    """Whether an answer is right, or the comparison that remains. Both as extracted, not normalised."""
    given, wanted = normalise(answer), normalise(truth)
    if given == wanted:
        return True
    if _CHOICE.fullmatch(wanted):
        choice = _CHOICE_ANSWER.match(given)
        chosen = choice and (choice["bracketed"] or choice["plain"])
        others = {
            next(filter(None, letters)) for letters in _ANOTHER_CHOICE.findall(given[choice.end() :] if choice else "")
        }
        return chosen == wanted and others <= {wanted}  # to name several is no answer
    given, given_unit = split_unit(given)
    wanted, wanted_unit = split_unit(wanted)
    if given_unit and wanted_unit and given_unit != wanted_unit:
        return False
    given_percent, wanted_percent = given.endswith("%"), wanted.endswith("%")
    given, wanted = given.rstrip("% "), wanted.rstrip("% ")
    given_number, wanted_number = literal(given), literal(wanted)
    if given_number and wanted_number:
        if same_number(given_number, wanted_number):
            return True
        # one of them is a percentage: 50% is 50 (the sign as a unit) and 0.5 (its value)
        if given_percent == wanted_percent:
            return False
        percentage, plain = (given_number, wanted_number) if given_percent else (wanted_number, given_number)
        return percentage.value / 100 == plain.value
    if given == wanted:
        return True
    if _is_letters(given) and _is_letters(wanted) and (_is_words(given) or _is_words(wanted)):
        return _letters(given) == _letters(wanted)
    if _brackets(given) * _brackets(wanted) < 0:
        return False
    if _LOOSE_DIGITS.fullmatch(given) or _LOOSE_DIGITS.fullmatch(wanted):
        return False
    return Question(given, wanted)


def _is_letters(text: str) -> bool:
    return _WORDS.fullmatch(_plain_text(text)) is not None


def _is_words(text: str) -> bool:
    r"""A word or a name rather than a product of variables: letters only, of which there are at least four, or that
    stand in `\text{}`, are capitals (`ABC`) or a short English word.
    """
    plain = _plain_text(text)
    named = text.startswith("\\text{") or plain.lower() in _SHORT_WORDS or (len(plain) > 1 and plain.isupper())
    return _is_letters(text) and (named or len(plain) >= 4)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", _plain_text(text).lower())


def _plain_text(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text)


def _brackets(text: str) -> int:
    r"""1 for a tuple or an interval, -1 for a set in braces, 0 otherwise."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return -1
    return 1 if text[:1] in ("(", "[") and text[-1:] in (")", "]") and "," in text else 0
