"""The tree that an answer is read into, and why a text may have none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction


class AnswerError(Exception):
    """Why an answer cannot be compared."""


class UnreadableError(AnswerError):
    """The text is not mathematics that the grammar knows."""


class UnsupportedError(UnreadableError):
    """The text is mathematics that only a computer algebra system can work out: an integral..."""


class TooCostlyError(AnswerError):
    """Reading or computing it would take more than is allowed for one answer."""


class UndefinedError(AnswerError):
    """An expression without a value here: a division by zero, a set where a number belongs."""


@dataclass(frozen=True, slots=True)
class Node:
    """One construct of an answer.

    Expressions: num (value: Fraction), sym (value: its name), const (pi, e, i, oo), add, mul, div,
    neg, inv, pow, root (radicand, degree), call (value: function), sum and prod (value: index;
    args: first, last, body), int (value: variable; args: limits, body), diff (value: variable),
    pm and mp (plus or minus the argument), deg, percent, quantity (value: unit), based (value:
    digits and base), ratio.
    Collections: seq (value: its brackets, "" for a bare list), ellipsis, matrix (value: number of
    columns; args row by row), cases (rows of seq).
    Sets: set (value: R, Z, N, Q, C, empty), union, intersection, difference, builder (conditions).
    Relations: rel (value: operators between the args).
    """

    kind: str
    args: tuple[Node, ...] = ()
    value: Fraction | str | int | tuple[str, ...] = ""

    @property
    def number(self) -> Fraction:
        """The value of a num."""
        assert isinstance(self.value, Fraction)
        return self.value

    @property
    def name(self) -> str:
        """The value of a sym, a const, a call, a seq, a set or an index."""
        assert isinstance(self.value, str)
        return self.value

    @property
    def operators(self) -> tuple[str, ...]:
        """The value of a rel."""
        assert isinstance(self.value, tuple)
        return self.value

    @property
    def columns(self) -> int:
        """The value of a matrix."""
        assert isinstance(self.value, int)
        return self.value


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.args)


def symbols(node: Node) -> set[str]:
    """Names of the variables that occur free or as an index."""
    return {part.name for part in walk(node) if part.kind == "sym"}


def integer(value: int) -> Node:
    """The node of a whole number."""
    return Node("num", value=Fraction(value))
