r"""Algebraic equality of an answer and the truth: math-verify, with its numeric comparison replaced.

Runs in a worker process of `verl_prefix.grading.pool`: nothing here bounds time or memory. math-verify's own limits
are switched off, since they need SIGALRM and the main thread and do not interrupt big-integer arithmetic.

math-verify compares constants as decimals with an absolute tolerance, so to it 1/2^{98} is 1/2^{99}. `_same_value`
replaces that: constants must agree in relative terms to 40 digits, exact ones beyond them as well (2^{2013} is not
2^{2013} - 1), and expressions with variables must agree at rational points. That needs no symbolic simplification,
which is also where most of the time and the hangs are.
"""

from __future__ import annotations

import logging
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Literal as OneOf

from verl_prefix.grading.literals import Literal, same_number

#: longer LaTeX is not parsed: the parser's time grows faster than linearly
MAX_PARSED_CHARS = 2_000

_DIGITS = 60
#: common leading digits that are seen through, and the size of constants, in bits, up to which that is tried
_SEEN_THROUGH, _MAX_BITS = 1_500, 20_000
_RELATIVE_ERROR = Fraction(1, 10**40)
#: values of the first variables, small and large, none special; with the signs that are used next to an absolute value
_POINTS = ("7/23", "41/13", "5/17", "97/11", "29/31", "61/7", "3/19", "53/10")
_MIN_POINTS = 4


def compare(answer: str, truth: str) -> OneOf["correct", "wrong", "unparsable", "truth_unparsable"]:
    """Compare two answers in normalised LaTeX (`literals.Question`). Not symmetric: the truth sets the form.

    A bare list is a set of solutions, so its order does not matter; tuples and intervals keep theirs. An equation that
    only names the answer (`x = 5`) equals the answer, and an inequality equals its interval.
    """
    wanted = _parse(truth)
    if wanted is None:
        return "truth_unparsable"
    given = _parse(answer)
    if given is None:
        return "unparsable"
    import math_verify

    _replace_numeric_comparison()
    equal = math_verify.verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True)
    return "correct" if equal else "wrong"


@cache
def _extraction() -> list:
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # `units` would strip single letters as well: 3t would be 3
    normalization = LatexNormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
    return [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]


def _parse(latex: str):
    """A sympy object, or None for what is not mathematics to math-verify."""
    import sympy
    from math_verify import parse

    if not latex or len(latex) > MAX_PARSED_CHARS:
        return None
    found = parse(f"\\boxed{{{latex}}}", _extraction(), fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        return None
    # math-verify leaves i a variable; bound ones (of a sum) are not free
    units = [symbol for symbol in getattr(found[0], "free_symbols", ()) if symbol.name == "i"]
    return found[0].xreplace(dict.fromkeys(units, sympy.I)) if units else found[0]


@cache
def _replace_numeric_comparison() -> None:
    import math_verify.grader as grader

    numeric, symbolic = grader.sympy_numeric_eq, grader.sympy_symbolic_eq

    def numeric_eq(one, other, float_rounding, numeric_precision) -> bool:
        if hasattr(one, "shape") or hasattr(other, "shape"):
            return numeric(one, other, float_rounding, numeric_precision)  # comes back with each pair of elements
        same = _same_value(one, other)
        return False if same is None else same

    def symbolic_eq(one, other) -> bool:
        if hasattr(one, "shape") or hasattr(other, "shape"):
            return symbolic(one, other)
        # only where nothing could be evaluated is there anything left to prove
        return _same_value(one, other) is None and symbolic(one, other)

    grader.sympy_numeric_eq, grader.sympy_symbolic_eq = numeric_eq, symbolic_eq


def _same_value(one, other) -> bool | None:
    """Whether two scalar expressions have the same value; None if they cannot be evaluated."""
    import sympy

    if not isinstance(one, sympy.Expr) or not isinstance(other, sympy.Expr):
        return None
    decimals = [_decimal(expression) for expression in (one, other)]
    if all(decimals):
        return same_number(*decimals)
    one, other = (_exact(expression) for expression in (one, other))
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if not symbols:
        return _same_constant(one, other, next(filter(None, decimals), None))
    return _same_function(one, other, symbols)


def _decimal(expression) -> Literal | None:
    """A float as the literal it was written as."""
    if not expression.is_Float:
        return None
    shown = Decimal(format(float(expression), ".15g")).normalize()
    return Literal(Fraction(shown), max(0, -shown.as_tuple().exponent), len(shown.as_tuple().digits))


def _exact(expression):
    import sympy

    return expression.xreplace(
        {number: sympy.Rational(format(float(number), ".15g")) for number in expression.atoms(sympy.Float)}
    )


def _same_constant(one, other, decimal: Literal | None = None) -> bool | None:
    import sympy

    first, second = one.evalf(_DIGITS), other.evalf(_DIGITS)
    if any(not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.Function) for value in (first, second)):
        return None
    if one == other:
        return True
    if not (first.is_finite and second.is_finite):
        return False
    difference, size = abs(first - second), max(abs(first), abs(second))
    if decimal is not None and decimal.tolerance is not None:
        return bool(difference < decimal.tolerance)
    if size < _RELATIVE_ERROR and not (one.is_rational and other.is_rational):
        return None  # what is left of cancelled terms, maybe: only the symbolic comparison can prove a zero
    return bool(difference <= size * _RELATIVE_ERROR) and not _differ_further_on(one, other, size)


def _differ_further_on(one, other, size) -> bool:
    """Whether exact constants that agree to 40 digits differ after all, as 2^{2013} - 1 and 2^{2013} do."""
    import sympy
    from sympy.concrete.expr_with_limits import ExprWithLimits

    approximated = (sympy.Float, sympy.Limit, ExprWithLimits)  # the latter: integrals, sums, products
    if one.has(*approximated) or other.has(*approximated):
        return False
    _, mantissa, exponent, bits = getattr(size, "_mpf_", (0, 0, 0, 0))
    if not mantissa or abs(exponent + bits) > _MAX_BITS:
        return False
    digits = _SEEN_THROUGH + abs(exponent + bits) // 3
    difference = (one - other).evalf(_DIGITS, maxn=digits)  # raises the precision until the common digits have gone
    return any(number._prec > 1 for number in difference.atoms(sympy.Float))  # 1: no digit was left


def _same_function(one, other, symbols) -> bool | None:
    """Equal at rational points. Variables are taken as positive unless an absolute value says that signs matter."""
    import sympy

    signed = one.has(sympy.Abs) or other.has(sympy.Abs)
    real, complex_ = [], []
    for shift in range(len(_POINTS)):
        point = {}
        for place, symbol in enumerate(symbols):
            size = sympy.Rational(_POINTS[(shift + place) % len(_POINTS)]) + place // len(_POINTS)
            point[symbol] = -size if signed and shift >> place % 3 & 1 else size
        values = [expression.subs(point).evalf(_DIGITS) for expression in (one, other)]
        if any(not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo, sympy.Function) for value in values):
            continue
        same = _same_constant(*values)
        if same is not None:
            (real if all(value.is_real for value in values) else complex_).append(same)
        if not all(real) or (len(real) >= _MIN_POINTS and not signed):
            break
    # outside an expression's real domain the branches of roots and logarithms may differ
    decisive = real if len(real) >= _MIN_POINTS or not all(real) else real + complex_
    return all(decisive) if len(decisive) >= _MIN_POINTS or not all(real) else None
