"""Whether two answers say the same: collections, sets, matrices, quantities and expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainer.math_answers.matrices import as_matrix
from trainer.math_answers.numeric import equal_expressions
from trainer.math_answers.parser import is_set
from trainer.math_answers.reading import Answer
from trainer.math_answers.relations import (
    assigned_values,
    equal_relations,
    is_relation,
    solution_interval,
    with_sign,
)
from trainer.math_answers.sets import equal_sets, real_set
from trainer.math_answers.tree import Node, UndefinedError, integer, symbols, walk
from trainer.math_answers.units import dimension_of, multiplier_of, same_words, share_a_word

MAX_UNORDERED = 40

_ANGLE_FUNCTIONS = frozenset("sin cos tan cot sec csc".split())


def equal_answers(gold: Answer, answer: Answer) -> bool:
    """Whether an answer is right, by its text, its words, its letter or its mathematics.

    Not symmetric: only the answer may be read with a decimal comma (`3,5`) or with a letter for a
    unit (`5 m`), and may state an equation for a formula (`a+b = 5`).

    Raises:
        TooCostlyError: a value is too large to compute.
    """
    if gold.text == answer.text or (gold.words is not None and gold.words == answer.words):
        return True
    if gold.choice is not None and answer.choice is not None:
        if gold.choice == answer.choice:
            return True
        if gold.is_marked_choice and gold.choice.upper() == answer.choice.upper():
            return True
    for one in gold.readings:
        numbers = () if symbols(one) else answer.numbers
        if any(_equal(one, other) for other in (*answer.readings, *numbers)):
            return True
    return False


def _equal(gold: Node, answer: Node) -> bool:
    if gold == answer:
        return True
    if is_relation(gold) or is_relation(answer):
        return _equal_with_relations(gold, answer)
    gold, answer = _without_plus_minus(gold), _without_plus_minus(answer)
    measures = _measured(gold), _measured(answer)
    if measures[0][1] or measures[1][1] or "quantity" in (gold.kind, answer.kind):
        return _equal_quantities(*measures)
    if _is_collection(gold) or _is_collection(answer):
        return _equal_collections(gold, answer)
    if gold.kind in _STRUCTURES or answer.kind in _STRUCTURES:
        return _equal_structures(gold, answer)
    matrices = as_matrix(gold), as_matrix(answer)
    if matrices[0] is not None and matrices[1] is not None:
        return _equal_structures(matrices[0], matrices[1])
    return matrices == (None, None) and _equal_values(gold, answer)


_STRUCTURES = ("cases", "based", "ellipsis", "builder")


def _equal_structures(gold: Node, answer: Node) -> bool:
    return (gold.kind, gold.value) == (answer.kind, answer.value) and _equal_in_order(
        gold.args, answer.args
    )


def _equal_in_order(golds: Sequence[Node], answers: Sequence[Node]) -> bool:
    return len(golds) == len(answers) and all(map(_equal, golds, answers))


def _equal_in_any_order(golds: Sequence[Node], answers: Sequence[Node]) -> bool:
    if len(golds) != len(answers):
        return False
    if _equal_in_order(golds, answers):
        return True
    if len(golds) > MAX_UNORDERED or any(node.kind == "ellipsis" for node in golds):
        return False
    left = list(answers)
    for gold in golds:
        found = next((at for at, answer in enumerate(left) if _equal(gold, answer)), None)
        if found is None:
            return False
        del left[found]
    return True


def _equal_values(gold: Node, answer: Node) -> bool:
    """Two expressions; percent and degrees may be left out of one of them."""
    for mark in ("percent", "deg"):
        if mark in (gold.kind, answer.kind):
            bare = [node.args[0] if node.kind == mark else node for node in (gold, answer)]
            if _equal_expressions(*bare):
                return True
    if _equal_expressions(gold, answer):
        return True
    if any(node.kind == "deg" for node in (*walk(gold), *walk(answer))):
        bare = [_without_degrees(gold), _without_degrees(answer)]
        return bare != [gold, answer] and _equal_expressions(*bare)
    return _is_ratio(gold) and _is_ratio(answer) and _equal_ratios(gold, answer)


def _equal_expressions(gold: Node, answer: Node) -> bool:
    try:
        return equal_expressions(gold, answer)
    except UndefinedError:
        return False


def _without_degrees(node: Node) -> Node:
    if node.kind == "call" and node.value in _ANGLE_FUNCTIONS:
        return node
    if node.kind == "deg":
        return node.args[0]
    return replace(node, args=tuple(_without_degrees(arg) for arg in node.args))


def _is_ratio(node: Node) -> bool:
    return node.kind == "ratio" and node.args[1].kind == "ratio"


def _equal_ratios(gold: Node, answer: Node) -> bool:
    """Ratios of three and more parts: the same up to a common factor."""
    parts = [_ratio_parts(node) for node in (gold, answer)]
    if len(parts[0]) != len(parts[1]):
        return False
    return all(
        _equal_expressions(Node("mul", (one, parts[1][0])), Node("mul", (other, parts[0][0])))
        for one, other in zip(*parts, strict=True)
    )


def _ratio_parts(node: Node) -> list[Node]:
    parts = []
    while node.kind == "ratio":
        first, node = node.args
        parts.append(first)
    return [*parts, node]


def _equal_quantities(gold_measure: tuple[Node, str], answer_measure: tuple[Node, str]) -> bool:
    """Numbers with units; a unit may be missing on one side, two must be the same or convert."""
    (gold, gold_unit), (answer, answer_unit) = gold_measure, answer_measure
    if not gold_unit or not answer_unit or same_words(gold_unit, answer_unit):
        return _equal(gold, answer)
    dimensions = dimension_of(gold_unit), dimension_of(answer_unit)
    if dimensions[0] is None and dimensions[1] is None:
        return share_a_word(gold_unit, answer_unit) and _equal(gold, answer)
    if dimensions[0] is None or dimensions[1] is None or dimensions[0][0] != dimensions[1][0]:
        return False
    gold, answer = (
        Node("mul", (node, Node("num", value=dimension[1])))
        for node, dimension in zip((gold, answer), dimensions, strict=True)
        if dimension is not None
    )
    return _equal_expressions(gold, answer)


def _measured(node: Node) -> tuple[Node, str]:
    if node.kind == "mul" and node.args[-1].kind == "div":
        # A fraction of unit names: \\frac{\\text{miles}}{\\text{hour}}.
        names = [str(arg.value) for arg in node.args[-1].args]
        if all(len(name) > 1 and dimension_of(name) is not None for name in names):
            return Node("mul", node.args[:-1]), " / ".join(names)
    if node.kind != "quantity":
        return node, ""
    if node.value == "prime":
        # Feet, inches and minutes of arc are all written so.
        return _measured(node.args[0])[0], ""
    factor, unit = multiplier_of(node.name)
    return (node.args[0] if factor == 1 else Node("mul", (node.args[0], integer(factor)))), unit


def _without_plus_minus(node: Node) -> Node:
    """A bare list of both values, where a plus-or-minus sign stands for two."""
    if node.kind == "seq":
        if node.value not in ("", "{}"):
            return _both_signs(node)
        items: list[Node] = []
        for arg in node.args:
            both = _without_plus_minus(arg)
            items.extend(both.args if both != arg and both.value == "" else [arg])
        return replace(node, args=tuple(items))
    return node if node.kind in ("quantity", "rel") else _both_signs(node)


def _both_signs(node: Node) -> Node:
    if not any(part.kind == "pm" for part in walk(node)):
        return node
    return Node("seq", (with_sign(node, "pm"), with_sign(node, "mp")))


def _is_collection(node: Node) -> bool:
    return node.kind == "seq" or is_set(node)


def _equal_collections(gold: Node, answer: Node) -> bool:
    sets = real_set(gold), real_set(answer)
    if sets[0] is not None and sets[1] is not None and equal_sets(sets[0], sets[1]):
        return True
    is_seq_pair = gold.kind == answer.kind == "seq"
    matrices = as_matrix(gold), as_matrix(answer)
    if matrices[0] is not None and matrices[1] is not None and not is_seq_pair:
        return _equal_vectors(matrices[0], matrices[1])
    if gold.kind != "seq" or answer.kind != "seq":
        return _equal_with_single(gold, answer)
    kinds = {gold.name, answer.name}
    if kinds <= {"", "{}"}:
        if "{}" in kinds:
            return _equal_in_any_order(_distinct(gold.args), _distinct(answer.args))
        return _equal_in_any_order(gold.args, answer.args)
    if len(kinds) == 1 or kinds <= {"", "()", "<>"} or kinds == {"", "[]"}:
        return _equal_in_order(gold.args, answer.args)
    may_be_intervals = len(gold.args) == 2
    return (
        kinds <= {"()", "<>", "[]"}
        and not may_be_intervals
        and _equal_in_order(gold.args, answer.args)
    )


def _equal_vectors(gold: Node, answer: Node) -> bool:
    """A matrix against brackets; one row and one column are the same vector here."""
    if gold.value == answer.value:
        return _equal_in_order(gold.args, answer.args)
    are_vectors = all(vector.columns in (1, len(vector.args)) for vector in (gold, answer))
    return are_vectors and _equal_in_order(gold.args, answer.args)


def _equal_with_single(gold: Node, answer: Node) -> bool:
    """A set against what is no list: one value, a product, an operation on symbolic sets."""
    if gold.kind == answer.kind and gold.kind != "mul":
        same = _equal_in_any_order if gold.kind in ("union", "intersection") else _equal_in_order
        return gold.value == answer.value and same(gold.args, answer.args)
    for one, other in ((gold, answer), (answer, gold)):
        if one.kind == "seq" and len(one.args) == 1 and other.kind != "seq":
            return _equal(one.args[0], other)
    return False


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    if len(nodes) > MAX_UNORDERED:
        return list(dict.fromkeys(nodes))
    kept: list[Node] = []
    for node in nodes:
        if not any(_equal(node, other) for other in kept):
            kept.append(node)
    return kept


def _equal_with_relations(gold: Node, answer: Node) -> bool:
    if is_relation(gold) and is_relation(answer):
        return equal_relations(gold, answer, _equal)
    sets = real_set(gold), real_set(answer)
    if sets[0] is not None and sets[1] is not None:
        if equal_sets(sets[0], sets[1]):
            return True
    relation, other = (gold, answer) if is_relation(gold) else (answer, gold)
    interval = solution_interval(relation)
    if interval is not None and is_set(other):
        return _equal(interval, other)
    return any(
        _equal(value, answer) if relation is gold else _equal(gold, value)
        for value in assigned_values(relation, is_gold=relation is gold)
    )
