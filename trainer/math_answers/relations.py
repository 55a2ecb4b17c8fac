"""Equations and inequalities: which are the same, and which value an equation gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from mpmath import mp

from trainer.math_answers.numeric import (
    constant_value,
    equal_constants,
    equal_expressions,
    ratio_of,
)
from trainer.math_answers.sets import equal_sets, real_set
from trainer.math_answers.tree import Node, UndefinedError, symbols, walk

MAX_RELATIONS = 40
ROUNDING_OF_APPROXIMATIONS = 0.02
"""How far apart, relatively, the sides of an approximate equality may be."""

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_EQUALITIES = ("=", "~")

Equal = Callable[[Node, Node], bool]


def is_relation(node: Node) -> bool:
    """Whether a tree is a relation or a list that starts with one."""
    if node.kind in ("rel", "and", "or"):
        return True
    return node.kind == "seq" and node.value == "" and node.args[0].kind == "rel"


def equal_relations(gold: Node, answer: Node, equal: Equal) -> bool:
    """Whether two relations, or lists of them in any order, say the same."""
    if symbols(gold) == symbols(answer):
        sets = real_set(gold), real_set(answer)
        if sets[0] is not None and sets[1] is not None:
            return equal_sets(sets[0], sets[1])
    golds, answers = _single_relations(gold), _single_relations(answer)
    if {gold.kind, answer.kind} == {"and", "or"} or len(golds) != len(answers):
        return _equal_memberships(golds, answers, equal)
    if len(golds) == len(answers) == 1 and _equal_functions(golds[0], answers[0], equal):
        return True
    left = list(answers)
    for one in golds[:MAX_RELATIONS]:
        found = next((at for at, other in enumerate(left) if _equal_pair(one, other, equal)), None)
        if found is None:
            return _equal_memberships(golds, answers, equal)
        del left[found]
    return not left


def assigned_values(relation: Node, *, is_gold: bool) -> list[Node]:
    """What may be meant where a value stands against a relation; empty where no value is given.

    `x = 5` gives 5, and so does a chain of equal sides. Several equations for one name give a bare
    list, for different names a tuple. Of an answer, the left side may be any formula without
    numbers (`a+b = 5`); of a gold it must be a name.
    """
    singles = _single_relations(relation)
    if len(singles) == 1:
        return _values_of(singles[0], is_gold)
    values, names = [], []
    for single in singles:
        candidates = _values_of(single, is_gold)
        if not candidates or not _is_equation(single):
            return []
        values.append(candidates[0])
        names.append(single.args[0])
    brackets = "" if len(set(names)) == 1 else "()"
    return [Node("seq", tuple(values), brackets)]


def solution_interval(relation: Node) -> Node | None:
    """The interval that a chain `a < x < b` or one inequality describes, ends as they stand."""
    if relation.kind != "rel":
        return None
    sides, operators = relation.args, relation.operators
    if len(operators) == 2 and sides[1].kind == "sym":
        if set(operators) <= {"<", "<="}:
            brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
            return Node("seq", (sides[0], sides[2]), brackets)
        if set(operators) <= {">", ">="}:
            brackets = ("(" if operators[1] == ">" else "[") + (")" if operators[0] == ">" else "]")
            return Node("seq", (sides[2], sides[0]), brackets)
    if len(operators) == 1 and sides[0].kind == "sym" and operators[0] in _MIRRORED:
        infinite = Node("const", value="oo")
        if operators[0] in (">", ">="):
            return Node("seq", (sides[1], infinite), "()" if operators[0] == ">" else "[)")
        low = Node("neg", (infinite,))
        return Node("seq", (low, sides[1]), "()" if operators[0] == "<" else "(]")
    return None


def _single_relations(node: Node) -> list[Node]:
    """The relations of a list, `x = 1, 2` and `x = \\pm 1` written out as two."""
    parts = [node] if node.kind == "rel" else list(node.args)
    singles: list[Node] = []
    for part in itertools.chain.from_iterable(map(_of_coordinates, parts)):
        if part.kind != "rel":
            previous = singles[-1]
            part = replace(previous, args=(*previous.args[:-1], part))
        if _is_equation(part) and any(inner.kind == "pm" for inner in walk(part)):
            singles.extend((with_sign(part, "pm"), with_sign(part, "mp")))
        else:
            singles.append(part)
    return singles


def _of_coordinates(node: Node) -> list[Node]:
    """`(x, y) = (2, 3)` as two equations."""
    if node.kind == "rel" and node.operators == ("=",):
        names, values = node.args
        if names.kind == values.kind == "seq" and names.value == values.value == "()":
            if is_name(names) and len(names.args) == len(values.args):
                pairs = zip(names.args, values.args, strict=True)
                return [Node("rel", pair, ("=",)) for pair in pairs]
    return [node]


def with_sign(node: Node, plus: str) -> Node:
    """The tree with plus-or-minus signs read as plus where their kind is `plus`, else as minus."""
    args = tuple(with_sign(arg, plus) for arg in node.args)
    if node.kind in ("pm", "mp"):
        return args[0] if node.kind == plus else Node("neg", args)
    return replace(node, args=args)


def _is_equation(relation: Node) -> bool:
    return set(relation.operators) <= set(_EQUALITIES)


def _equal_memberships(golds: list[Node], answers: list[Node], equal: Equal) -> bool:
    """Solutions listed in two ways: `x = 1, x = 2` and `x \\in {1, 2}`."""
    names = {single.args[0] for single in (*golds, *answers)}
    lists = []
    for singles in (golds, answers):
        values: list[Node] = []
        for single in singles:
            if single.value not in (("=",), ("in",)):
                return False
            side = single.args[1]
            is_member = single.value == ("in",)
            if is_member and not (side.kind == "seq" and side.value == "{}"):
                return False
            values.extend(side.args if is_member else (side,))
        lists.append(Node("seq", tuple(values), "{}"))
    return len(names) == 1 and equal(lists[0], lists[1])


def _equal_pair(gold: Node, answer: Node, equal: Equal) -> bool:
    if gold.value == ("in",) or answer.value == ("in",):
        return gold.value == answer.value and all(map(equal, gold.args, answer.args))
    if _is_equation(gold) and _is_equation(answer):
        return _equal_equations(gold, answer, equal)
    if len(gold.args) == len(answer.args) == 2:
        return _equal_inequalities(gold, answer)
    return any(
        gold.value == other.value and all(map(equal, gold.args, other.args))
        for other in (answer, _mirrored(answer))
    )


def _equal_equations(gold: Node, answer: Node, equal: Equal) -> bool:
    if _name_side(gold) == _name_side(answer):
        values = _values_of(gold, True), _values_of(answer, True)
        if any(equal(one, other) for one in values[0] for other in values[1]):
            return True
    if len(gold.args) != 2 or len(answer.args) != 2:
        return False
    return ratio_of(_difference(gold), _difference(answer)) is not None


def _equal_functions(gold: Node, answer: Node, equal: Equal) -> bool:
    """`f(x) = 2x` and `y = 2x`: the same function under two names."""
    if not all(map(_is_equation, (gold, answer))):
        return False
    if not all(_is_function_head(_name_side(relation)) for relation in (gold, answer)):
        return False
    values = _values_of(gold, True), _values_of(answer, True)
    return any(equal(one, other) for one in values[0] for other in values[1])


def _equal_inequalities(gold: Node, answer: Node) -> bool:
    gold, answer = (
        _mirrored(relation) if set(relation.operators) <= {">", ">="} else relation
        for relation in (gold, answer)
    )
    if gold.value != answer.value:
        return False
    ratio = ratio_of(_difference(gold), _difference(answer))
    if ratio is None:
        return False
    return gold.value == ("!=",) or bool(mp.im(ratio) == 0 and mp.re(ratio) > 0)


def _mirrored(relation: Node) -> Node:
    operators = tuple(
        _MIRRORED.get(operator, operator) for operator in reversed(relation.operators)
    )
    return Node("rel", tuple(reversed(relation.args)), operators)


def _difference(relation: Node) -> Node:
    return Node("add", (relation.args[0], Node("neg", (relation.args[1],))))


def _values_of(relation: Node, is_gold: bool) -> list[Node]:
    sides, operators = list(relation.args), list(relation.operators)
    if operators == ["in"]:
        return [sides[1]] if is_name(sides[0]) else []
    if not _is_equation(relation):
        return []
    if is_name(sides[-1]) and not is_name(sides[0]):
        sides, operators = sides[::-1], operators[::-1]
    is_named = is_name(sides[0]) or (not is_gold and _is_number_free(sides[0]))
    if is_named:
        sides, operators = sides[1:], operators[1:]
        while len(sides) > 1 and is_name(sides[0]):
            sides, operators = sides[1:], operators[1:]
    if not _sides_agree(sides, operators, only_constants=is_named):
        return []
    values = [sides[-1]]
    if "~" in operators:
        values.append(sides[operators.index("~")])
    return values


def _sides_agree(sides: Sequence[Node], operators: Sequence[str], only_constants: bool) -> bool:
    for left, operator, right in zip(sides, operators, sides[1:], strict=False):
        values = constant_value(left), constant_value(right)
        if values[0] is not None and values[1] is not None:
            distance = abs(values[0] - values[1])
            rounding = ROUNDING_OF_APPROXIMATIONS * max(abs(values[0]), abs(values[1]))
            if not (equal_constants(*values) or (operator == "~" and bool(distance <= rounding))):
                return False
        elif not only_constants:
            try:
                if not equal_expressions(left, right):
                    return False
            except UndefinedError:
                return False
    return True


def _name_side(relation: Node) -> Node:
    first, last = relation.args[0], relation.args[-1]
    return last if is_name(last) and not is_name(first) else first


def is_name(node: Node) -> bool:
    """Whether a tree names something: `x`, `AB`, `f(x)`, `P(X = 1)`, `|AB|`, `e`."""
    if node.kind == "sym" or (node.kind == "const" and node.value in ("e", "i")):
        return True
    if node.kind == "call" and node.value in ("abs", "det", "arg", "Re", "Im", "max", "min"):
        return all(map(is_name, node.args))
    if node.kind == "seq" and node.value in ("()", "<>"):
        return all(map(is_name, node.args))
    if node.kind == "mul" and node.args[0].kind == "sym":
        return all(
            is_name(arg) or arg.kind in ("num", "rel", "seq", "intersection", "union", "set")
            for arg in node.args[1:]
        )
    return False


def _is_function_head(node: Node) -> bool:
    is_applied = node.kind == "mul" and all(arg.kind == "sym" for arg in node.args)
    return node == Node("sym", value="y") or (is_applied and len(node.args) == 2)


def _is_number_free(node: Node) -> bool:
    kinds = {part.kind for part in walk(node)}
    return bool(symbols(node)) and kinds <= {
        "sym",
        "add",
        "mul",
        "div",
        "inv",
        "neg",
        "call",
        "deg",
    }
