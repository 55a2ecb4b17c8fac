"""Sets of real numbers: intervals, unions, differences, and the solutions of inequalities."""

from __future__ import annotations

from dataclasses import dataclass

from mpmath import mp, mpf

from trainer.math_answers.numeric import constant_value, equal_constants
from trainer.math_answers.tree import Node, symbols

MAX_PIECES = 200

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval; a point when both ends are the same."""

    low: mpf
    high: mpf
    has_low: bool
    has_high: bool


REALS = (Piece(-mp.inf, mp.inf, False, False),)


def real_set(node: Node) -> tuple[Piece, ...] | None:
    """The set as sorted pieces that do not touch; None where the tree is no set of known reals.

    Inequalities in one variable count with their solutions, where the variable stands alone.
    """
    pieces = _pieces(node)
    return None if pieces is None or len(pieces) > MAX_PIECES else tuple(_merged(pieces))


def equal_sets(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> bool:
    """Whether two results of `real_set` are the same set."""
    return len(left) == len(right) and all(
        (one.has_low, one.has_high) == (other.has_low, other.has_high)
        and equal_constants(one.low, other.low)
        and equal_constants(one.high, other.high)
        for one, other in zip(left, right, strict=True)
    )


def _pieces(node: Node) -> list[Piece] | None:
    if node.kind == "set":
        return {"R": list(REALS), "empty": []}.get(node.name)
    if node.kind == "seq" and node.value == "{}":
        return _points(node)
    if node.kind == "seq" and node.value not in ("", "<>") and len(node.args) == 2:
        return _interval(node)
    if node.kind in ("union", "or"):
        return _union(node)
    if node.kind in ("intersection", "and"):
        return _intersection(node)
    if node.kind == "seq" and node.value == "":
        return _conditions(node)
    if node.kind == "difference":
        left, right = (_pieces(arg) for arg in node.args)
        return None if left is None or right is None else _intersect(left, _complement(right))
    if node.kind == "rel":
        return _solutions(node)
    if node.kind == "builder":
        return _built(node)
    return None


def _points(node: Node) -> list[Piece] | None:
    pieces = []
    for arg in node.args:
        value = _real_value(arg)
        if value is None:
            return None
        pieces.append(Piece(value, value, True, True))
    return pieces


def _interval(node: Node) -> list[Piece] | None:
    low, high = (_real_value(arg) for arg in node.args)
    if low is None or high is None:
        return None
    opening, closing = node.name[0], node.name[1]
    # An infinite end is never part of it, however it is written.
    has_low, has_high = opening == "[" and not mp.isinf(low), closing == "]" and not mp.isinf(high)
    if low > high or (low == high and not (has_low and has_high)):
        return None
    return [Piece(low, high, has_low, has_high)]


def _union(node: Node) -> list[Piece] | None:
    pieces: list[Piece] = []
    for arg in node.args:
        part = _pieces(arg)
        if part is None:
            return None
        pieces.extend(part)
    return pieces


def _intersection(node: Node) -> list[Piece] | None:
    pieces = list(REALS)
    for arg in node.args:
        part = _pieces(arg)
        if part is None:
            return None
        pieces = _intersect(pieces, _merged(part))
    return pieces


def _conditions(node: Node) -> list[Piece] | None:
    """Inequalities with commas between: all hold, unless that cannot be; then one of them does."""
    if not all(arg.kind == "rel" and arg.operators != ("=",) for arg in node.args):
        return None
    return _intersection(node) or _union(node)


def _built(node: Node) -> list[Piece] | None:
    head, condition = node.args
    if head.kind == "rel":
        base, name = _pieces(head), head.args[0]
    else:
        base, name = list(REALS), head
    conditions = condition.args if condition.kind == "seq" else (condition,)
    for part in conditions:
        pieces = _pieces(part)
        if name.kind != "sym" or symbols(part) - {name.name} or pieces is None:
            return None
        base = None if base is None else _intersect(base, _merged(pieces))
    return base


def _solutions(node: Node) -> list[Piece] | None:
    """Of a relation, or a chain of them, in which each comparison has the variable on one side."""
    names = symbols(node)
    if len(names) != 1:
        return None
    pieces = list(REALS)
    for left, operator, right in zip(node.args, node.operators, node.args[1:], strict=False):
        part = _comparison(left, operator, right)
        if part is None:
            return None
        pieces = _intersect(pieces, _merged(part))
    return pieces


def _comparison(left: Node, operator: str, right: Node) -> list[Piece] | None:
    if operator == "in":
        return _pieces(right) if left.kind == "sym" else None
    if not symbols(left):
        if operator not in _FLIPPED:
            return None
        left, operator, right = right, _FLIPPED[operator], left
    bound = _real_value(right)
    if bound is None:
        return None
    if left.kind != "sym":
        is_magnitude = left.kind == "call" and left.value == "abs" and left.args[0].kind == "sym"
        return _magnitude(operator, bound) if is_magnitude and bound >= 0 else None
    point = [Piece(bound, bound, True, True)]
    if operator in ("=", "!="):
        return point if operator == "=" else _complement(point)
    if operator in ("<", "<="):
        return [Piece(-mp.inf, bound, False, operator == "<=" and not mp.isinf(bound))]
    if operator in (">", ">="):
        return [Piece(bound, mp.inf, operator == ">=" and not mp.isinf(bound), False)]
    return None


def _magnitude(operator: str, bound: mpf) -> list[Piece] | None:
    inside = Piece(-bound, bound, operator in ("<=", ">"), operator in ("<=", ">"))
    if operator in ("<", "<="):
        return [inside] if bound > 0 or operator == "<=" else []
    return _complement([inside]) if operator in (">", ">=") else None


def _real_value(node: Node) -> mpf | None:
    value = constant_value(node)
    return None if value is None or mp.im(value) != 0 else mp.re(value)


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Sorted, with pieces that overlap or touch made one."""
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.low, not piece.has_low)):
        last = merged[-1] if merged else None
        touches = last is not None and (
            piece.low < last.high
            or (equal_constants(piece.low, last.high) and (piece.has_low or last.has_high))
        )
        if last is None or not touches:
            merged.append(piece)
        elif equal_constants(piece.high, last.high):
            has_low = last.has_low or (equal_constants(piece.low, last.low) and piece.has_low)
            has_high = last.has_high or piece.has_high
            merged[-1] = Piece(last.low, last.high, has_low, has_high)
        elif piece.high > last.high:
            merged[-1] = Piece(last.low, piece.high, last.has_low, piece.has_high)
    return merged


def _complement(pieces: list[Piece]) -> list[Piece]:
    gaps: list[Piece] = []
    low, has_low = -mp.inf, False
    for piece in _merged(pieces):
        _append_gap(gaps, Piece(low, piece.low, has_low, not piece.has_low))
        low, has_low = piece.high, not piece.has_high
    _append_gap(gaps, Piece(low, mp.inf, has_low, False))
    return gaps


def _append_gap(gaps: list[Piece], gap: Piece) -> None:
    is_point = equal_constants(gap.low, gap.high)
    if mp.isinf(gap.low) and gap.low == gap.high:
        return
    if (is_point and gap.has_low and gap.has_high) or (not is_point and gap.low < gap.high):
        has_low = gap.has_low and not mp.isinf(gap.low)
        gaps.append(Piece(gap.low, gap.high, has_low, gap.has_high and not mp.isinf(gap.high)))


def _intersect(left: list[Piece], right: list[Piece]) -> list[Piece]:
    return _complement(_complement(left) + _complement(right))
