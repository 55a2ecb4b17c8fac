"""The value of an expression at a point, with bounds on what is computed.

mpmath numbers at the precision in force. Every operation that can grow checks the size of its
result before it is computed: powers, factorials, exponentials, sums.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

from mpmath import mp, mpc, mpf

from trainer.math_answers.tree import Node, TooCostlyError, UndefinedError

Number: TypeAlias = "mpf | mpc"

MAX_BITS = 2e8
"""Bits before the point of the largest number that is computed, in floating point."""
MAX_ANGLE = 1e12
MAX_FACTORIAL = 1e7
MAX_TERMS = 400
MAX_STEPS = 60_000
"""Nodes evaluated in the comparison of one answer with one gold."""
MAX_MATRIX_SIDE = 6

_WHOLE_TOLERANCE = mpf(10) ** -25


def evaluate(node: Node, point: dict[str, mpf], *, is_real: bool = False) -> Number:
    """The value with variables as in the point.

    Args:
        is_real: a part that is not real has no value; otherwise principal values count.

    Raises:
        UndefinedError: no value there, or the tree is no expression.
        TooCostlyError: the value, or the work, is too large.
    """
    try:
        return _Evaluator(point, is_real).value(node)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError, KeyError) as error:
        # What mpmath raises outside the domain of a function.
        raise UndefinedError(str(error)) from error


class _Budget:
    """Steps that are left; one of them per process, which compares one answer at a time."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS


_budget = _Budget()


def renew_budget() -> None:
    """Start the count of steps for the next comparison."""
    _budget.steps = MAX_STEPS


class _Evaluator:
    def __init__(self, point: dict[str, mpf], is_real: bool) -> None:
        self._point = point
        self._is_real = is_real

    def value(self, node: Node) -> Number:
        _budget.steps -= 1
        if _budget.steps < 0:
            raise TooCostlyError(f"more than {MAX_STEPS} steps")
        value = self._value(node)
        if self._is_real and isinstance(value, mpc):
            if abs(value.imag) > _WHOLE_TOLERANCE * abs(value):
                raise UndefinedError("not real")
            value = value.real
        return value

    def _value(self, node: Node) -> Number:
        if node.kind in _OPERATIONS:
            return _OPERATIONS[node.kind]([self.value(arg) for arg in node.args])
        if node.kind == "num":
            return mpf(node.number.numerator) / node.number.denominator
        if node.kind == "sym" and node.name in self._point:
            return self._point[node.name]
        if node.kind == "const":
            return {"pi": +mp.pi, "e": +mp.e, "i": mpc(0, 1), "oo": mp.inf}[node.name]
        if node.kind == "pow":
            return self._power(node)
        if node.kind in ("sum", "prod"):
            return self._series(node)
        if node.kind in ("int", "diff"):
            return self._calculus(node)
        if node.kind == "call" and node.value == "det":
            return self._determinant(node.args[0])
        if node.kind == "call" and node.value in _FUNCTIONS:
            arity, function = _FUNCTIONS[node.name]
            if arity in (len(node.args), None):
                return function(*(self.value(arg) for arg in node.args))
        raise UndefinedError(f"no value: {node.kind} {node.value}")

    def _power(self, node: Node) -> Number:
        base, exponent = (self.value(arg) for arg in node.args)
        degree = _odd_root(node.args[1])
        if degree is not None and _is_negative(base):
            numerator, denominator = degree
            return _power(-_power(-base, 1 / mpf(denominator)), mpf(numerator))
        return _power(base, exponent)

    def _series(self, node: Node) -> Number:
        first, last = (_whole(self.value(arg)) for arg in node.args[:2])
        if last - first >= MAX_TERMS:
            raise TooCostlyError(f"more than {MAX_TERMS} terms")
        name, outer = node.name, self._point
        total: Number = mpf(0 if node.kind == "sum" else 1)
        for index in range(first, last + 1):
            self._point = outer | {name: mpf(index)}
            term = self.value(node.args[2])
            total = total + term if node.kind == "sum" else total * term
        self._point = outer
        return total

    def _calculus(self, node: Node) -> Number:
        outer = self._point

        def body(at: mpf) -> Number:
            self._point = outer | {node.name: at}
            value = self.value(node.args[-1])
            self._point = outer
            return value

        if node.kind == "diff":
            return mp.diff(body, self._point[node.name])
        value, error = mp.quad(body, [self.value(arg) for arg in node.args[:2]], error=True)
        if error > mpf(10) ** (-mp.dps // 2) * max(1, abs(value)):
            raise UndefinedError("an integral that does not converge")
        return value

    def _determinant(self, matrix: Node) -> Number:
        columns = matrix.columns if matrix.kind == "matrix" else 0
        if not 0 < columns <= MAX_MATRIX_SIDE or len(matrix.args) != columns**2:
            raise UndefinedError("the determinant of what is no small square matrix")
        cells = [self.value(arg) for arg in matrix.args]
        rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        return _determinant(rows)


def _determinant(rows: list[list[Number]]) -> Number:
    if not rows:
        return mpf(1)
    total: Number = mpf(0)
    for column, cell in enumerate(rows[0]):
        minor = [row[:column] + row[column + 1 :] for row in rows[1:]]
        total += (-1) ** column * cell * _determinant(minor)
    return total


def _power(base: Number, exponent: Number) -> Number:
    if base == 0:
        if mp.re(exponent) < 0:
            raise UndefinedError("zero to a negative power")
        return mpf(1 if exponent == 0 else 0)
    if not (mp.isinf(base) or mp.isinf(exponent)):
        bits = abs(exponent) * max(1, abs(mp.mag(base)))
        if base != 1 and bits > MAX_BITS:
            raise TooCostlyError("a power of too many bits")
    return mp.power(base, exponent)


def _root(radicand: Number, degree: Number) -> Number:
    if degree == 0:
        raise UndefinedError("a root of degree zero")
    if _is_negative(radicand) and mp.isint(degree) and int(mp.re(degree)) % 2:
        return -_power(-radicand, 1 / degree)
    return mp.sqrt(radicand) if degree == 2 else _power(radicand, 1 / degree)


def _odd_root(exponent: Node) -> tuple[int, int] | None:
    """Numerator and denominator of an exponent such as 1/3, whose root of -8 is real."""
    if exponent.kind == "neg":
        inner = _odd_root(exponent.args[0])
        return None if inner is None else (-inner[0], inner[1])
    is_quotient = exponent.kind == "div" or (
        exponent.kind == "mul" and len(exponent.args) == 2 and exponent.args[1].kind == "inv"
    )
    if not is_quotient:
        return None
    top, bottom = exponent.args
    bottom = bottom.args[0] if bottom.kind == "inv" else bottom
    if not (isinstance(top.value, Fraction) and isinstance(bottom.value, Fraction)):
        return None
    value = top.value / bottom.value if bottom.value else Fraction(0)
    is_odd = value.denominator % 2 == 1 and value.denominator > 1
    return (value.numerator, value.denominator) if is_odd else None


def _is_negative(value: Number) -> bool:
    return bool(mp.im(value) == 0 and mp.re(value) < 0)


def _real(value: Number) -> mpf:
    if abs(mp.im(value)) > _WHOLE_TOLERANCE * abs(value):
        raise UndefinedError("not real")
    return mp.re(value)


def _snapped(value: Number) -> mpf:
    """The value, or the whole number that it is but for rounding."""
    real = _real(value)
    if mp.isinf(real) or mp.mag(real) > mp.prec:
        raise TooCostlyError("a whole number of too many digits")
    nearest = mp.nint(real)
    return nearest if abs(real - nearest) <= _WHOLE_TOLERANCE * max(1, abs(real)) else real


def _whole(value: Number) -> int:
    snapped = _snapped(value)
    if snapped != mp.nint(snapped):
        raise UndefinedError("not a whole number")
    return int(snapped)


def _angle(function: Callable[[Number], Number]) -> Callable[[Number], Number]:
    def bounded(value: Number) -> Number:
        if mp.isinf(value) or abs(value) > MAX_ANGLE:
            raise TooCostlyError("an angle of too many turns")
        return function(value)

    return bounded


def _exponential(function: Callable[[Number], Number]) -> Callable[[Number], Number]:
    def bounded(value: Number) -> Number:
        if not mp.isinf(value) and abs(value) > MAX_BITS:
            raise TooCostlyError("an exponential of too many bits")
        return function(value)

    return bounded


def _log(value: Number, base: Number | None = None) -> Number:
    if value == 0:
        raise UndefinedError("the logarithm of zero")
    return mp.log(value) if base is None else mp.log(value) / mp.log(base)


def _factorial(value: Number) -> Number:
    if abs(value) > MAX_FACTORIAL:
        raise TooCostlyError("the factorial of a large number")
    return mp.factorial(_snapped(value))


def _binomial(top: Number, bottom: Number) -> Number:
    if max(abs(top), abs(bottom)) > MAX_FACTORIAL:
        raise TooCostlyError("the binomial of large numbers")
    return mp.binomial(_snapped(top), _snapped(bottom))


def _modulo(value: Number, modulus: Number) -> Number:
    snapped, divisor = _snapped(value), _snapped(modulus)
    return snapped - divisor * mp.floor(snapped / divisor)


def _gcd(*values: Number) -> Number:
    result = 0
    for value in values:
        result = _greatest_divisor(result, abs(_whole(value)))
    return mpf(result)


def _lcm(*values: Number) -> Number:
    result = 1
    for value in values:
        whole = abs(_whole(value))
        result = result * whole // max(1, _greatest_divisor(result, whole))
    return mpf(result)


def _greatest_divisor(left: int, right: int) -> int:
    while right:
        left, right = right, left % right
    return left


def _product(values: list[Number]) -> Number:
    product: Number = mpf(1)
    for value in values:
        product = product * value
    return product


_OPERATIONS: dict[str, Callable[[list[Number]], Number]] = {
    "add": lambda values: sum(values[1:], values[0]),
    "mul": _product,
    "div": lambda values: values[0] / values[1],
    "ratio": lambda values: values[0] / values[1],
    "inv": lambda values: 1 / values[0],
    "neg": lambda values: -values[0],
    "root": lambda values: _root(values[0], values[1]),
    "percent": lambda values: values[0] / 100,
    "deg": lambda values: values[0] * mp.pi / 180,
}

_FUNCTIONS: dict[str, tuple[int | None, Callable[..., Number]]] = {
    **{name: (1, _angle(getattr(mp, name))) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{
        name: (1, _exponential(getattr(mp, name)))
        for name in ("sinh", "cosh", "tanh", "sech", "csch", "coth", "exp")
    },
    **{f"arc{name}": (1, getattr(mp, f"a{name}")) for name in ("sin", "cos", "tan")},
    **{f"arc{name}": (1, getattr(mp, f"a{name}")) for name in ("cot", "sec", "csc")},
    **{f"arc{name}": (1, getattr(mp, f"a{name}")) for name in ("sinh", "cosh", "tanh")},
    "ln": (1, _log),
    "log": (None, _log),
    "lg": (1, lambda value: _log(value, mpf(10))),
    "abs": (1, abs),
    "sgn": (1, lambda value: mp.sign(_real(value))),
    "floor": (1, lambda value: mp.floor(_snapped(value))),
    "ceil": (1, lambda value: mp.ceil(_snapped(value))),
    "factorial": (1, _factorial),
    "binom": (2, _binomial),
    "mod": (2, _modulo),
    "gcd": (None, _gcd),
    "lcm": (None, _lcm),
    "max": (None, lambda *values: max(map(_real, values))),
    "min": (None, lambda *values: min(map(_real, values))),
    "Re": (1, mp.re),
    "Im": (1, mp.im),
    "arg": (1, mp.arg),
}
