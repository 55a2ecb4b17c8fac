"""Whether two expressions are equal: exactly where they are rational, else by values.

Constants are computed to 40 and to 80 digits: the difference of equal ones shrinks with the
precision, the difference of others stays. Expressions with variables are compared so at fixed
points, of both signs; where both are real at a point they must agree there. Nothing depends on a
clock or on random state.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction

from mpmath import mp, mpf

from trainer.math_answers.evaluation import Number, evaluate
from trainer.math_answers.tree import Node, UndefinedError, symbols, walk

DIGITS = 40
MORE_DIGITS = 80
NUM_POINTS = 8
NUM_INTEGER_POINTS = 14
MIN_AGREEING_POINTS = 2
MAX_EXACT_BITS = 4000

_SHRINKS = mpf(10) ** -20
_NEAR = mpf(10) ** -25
_ROUNDING = mpf(10) ** -70
_WHOLE_NUMBER_KINDS = ("floor", "ceil", "factorial", "binom", "mod", "gcd", "lcm")


def equal_expressions(left: Node, right: Node) -> bool:
    """Whether two expressions have the same value wherever both have a real one.

    Raises:
        UndefinedError: one of them is no expression, or has no value at any of the points.
        TooCostlyError: a value is too large to compute.
    """
    if left == right:
        return True
    left_exact, right_exact = exact_value(left), exact_value(right)
    if left_exact is not None and right_exact is not None:
        return left_exact == right_exact
    is_complex = any(part == Node("const", value="i") for part in (*walk(left), *walk(right)))
    points = list(_points(left, right))
    agreeing = 0 if is_complex else _agreeing_points(left, right, points, is_real=True)
    if agreeing == 0:
        agreeing = _agreeing_points(left, right, points, is_real=False)
    if agreeing == 0:
        raise UndefinedError("no value at any point")
    return agreeing is not None and agreeing >= min(MIN_AGREEING_POINTS, len(points))


def _agreeing_points(
    left: Node, right: Node, points: list[dict[str, mpf]], *, is_real: bool
) -> int | None:
    """At how many points the values are the same, of those where both exist; None if they differ.

    Args:
        is_real: only where all parts of both are real.
    """
    agreeing = 0
    for point in points:
        try:
            if not _agree_at(left, right, point, is_real):
                return None
            agreeing += 1
        except UndefinedError:
            continue
    return agreeing


def ratio_of(left: Node, right: Node) -> Number | None:
    """The constant c with left = c * right at all points; None where there is none but zero."""
    ratios = []
    for point in _points(left, right):
        try:
            values = [_value(node, point, DIGITS) for node in (left, right)]
        except UndefinedError:
            continue
        if values[1] == 0 or values[0] == 0:
            if values[0] == values[1]:
                continue
            return None
        ratios.append(values[0] / values[1])
        if abs(ratios[-1] - ratios[0]) > _NEAR * abs(ratios[0]):
            return None
    return ratios[0] if ratios else None


def constant_value(node: Node) -> Number | None:
    """The value to 40 digits of an expression without variables; None for any other tree."""
    if symbols(node):
        return None
    try:
        return _value(node, {}, DIGITS)
    except UndefinedError:
        return None


def equal_constants(left: Number, right: Number) -> bool:
    """Whether two values of `constant_value` are the same to nearly all their digits."""
    if left == right or mp.isinf(left) or mp.isinf(right):
        return bool(left == right)
    return bool(abs(left - right) <= _NEAR * max(abs(left), abs(right)))


def exact_value(node: Node) -> Fraction | None:
    """The value of a tree of rational arithmetic; None for anything else and for large numbers."""
    try:
        return _exact(node)
    except ZeroDivisionError:
        return None


def _exact(node: Node) -> Fraction | None:
    if node.kind == "num":
        return node.number
    operation = _EXACT.get(node.kind)
    if operation is None:
        return None
    values = []
    for arg in node.args:
        value = _exact(arg)
        if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > (
            MAX_EXACT_BITS
        ):
            return None
        values.append(value)
    return operation(values)


def _exact_sum(values: list[Fraction]) -> Fraction | None:
    return sum(values, Fraction(0))


def _exact_product(values: list[Fraction]) -> Fraction | None:
    product = Fraction(1)
    for value in values:
        product *= value
        if product.numerator.bit_length() + product.denominator.bit_length() > 2 * MAX_EXACT_BITS:
            return None
    return product


def _exact_power(values: list[Fraction]) -> Fraction | None:
    base, exponent = values
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * bits > MAX_EXACT_BITS:
        return None
    return base ** int(exponent)


_EXACT: dict[str, Callable[[list[Fraction]], Fraction | None]] = {
    "add": _exact_sum,
    "mul": _exact_product,
    "div": lambda values: values[0] / values[1],
    "ratio": lambda values: values[0] / values[1],
    "inv": lambda values: 1 / values[0],
    "neg": lambda values: -values[0],
    "pow": _exact_power,
    "percent": lambda values: values[0] / 100,
}


def _agree_at(left: Node, right: Node, point: dict[str, mpf], is_real: bool) -> bool:
    values = [_value(node, point, DIGITS, is_real) for node in (left, right)]
    if any(mp.isinf(value) for value in values):
        return bool(values[0] == values[1])
    difference = abs(values[0] - values[1])
    if difference > 0 or not point:
        finer = [_value(node, point, MORE_DIGITS, is_real) for node in (left, right)]
        with mp.workdps(MORE_DIGITS):
            finer_difference = abs(finer[0] - finer[1])
            scale = max(abs(finer[0]), abs(finer[1]))
            shrinks = finer_difference <= _SHRINKS * difference
            return bool(shrinks or finer_difference <= _ROUNDING * scale)
    return True


def _value(node: Node, point: dict[str, mpf], digits: int, is_real: bool = False) -> Number:
    with mp.workdps(digits):
        value = evaluate(node, point, is_real=is_real)
    if mp.isnan(value):
        raise UndefinedError("not a number")
    return value


def _points(left: Node, right: Node) -> Iterator[dict[str, mpf]]:
    names = sorted(symbols(left) | symbols(right))
    if not names:
        yield {}
        return
    over_integers = any(_needs_integers(part) for part in (*walk(left), *walk(right)))
    with mp.workdps(MORE_DIGITS):
        for index in range(NUM_INTEGER_POINTS if over_integers else NUM_POINTS):
            choose = _integer_coordinate if over_integers else _coordinate
            yield {name: choose(name, index) for name in names}


def _needs_integers(node: Node) -> bool:
    if node.kind == "pow":
        base, exponent = node.args
        return base.kind == "neg" and base.args[0].kind == "num" and bool(symbols(exponent))
    is_whole = node.kind in ("sum", "prod") or node.value in _WHOLE_NUMBER_KINDS
    return is_whole and bool(symbols(node))


def _coordinate(name: str, index: int) -> mpf:
    # The first points are positive, where roots and logarithms are real.
    chosen = zlib.crc32(f"{index} {name}".encode())
    magnitude = mpf(chosen % 20011 + 2003) / 10007
    is_negative = index >= NUM_POINTS // 2 and chosen >> 20 & 1
    return -magnitude if is_negative else magnitude


def _integer_coordinate(name: str, index: int) -> mpf:
    return mpf(zlib.crc32(f"{index} {name}".encode()) % 23 + 1)
