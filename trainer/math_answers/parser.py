"""Reads tokens into a tree: lists, relations and sets here, expressions in `expressions`.

A hand-written descent over a closed grammar: what it does not know is refused, nothing is
evaluated, and its recursion is bounded.
"""

from __future__ import annotations

from trainer.math_answers.expressions import ExpressionParser
from trainer.math_answers.tokens import Token, tokenise
from trainer.math_answers.tree import Node, TooCostlyError, UnreadableError
from trainer.math_answers.vocabulary import is_unit_stop

MAX_TREE_DEPTH = 150

_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "in", "~"))
_SET_OPERATORS = {"cup": "union", "cap": "intersection", "setminus": "difference"}


def parse(text: str, *, thousands: bool = True, tight: bool = False) -> Node:
    """The tree of an answer.

    Args:
        text: normalised as `reading` does.
        thousands: as `tokenise`.
        tight: read `1/2x` as 1/(2x), not as (1/2)x.

    Raises:
        UnsupportedError: it needs computer algebra.
        UnreadableError: not known to the grammar.
        TooCostlyError: too long or too deeply nested.
    """
    parser = _AnswerParser(tokenise(text, thousands=thousands), tight)
    if parser.at_op("=", "~"):
        parser.take()
    node = parser.items("end")
    if parser.peek().kind != "end":
        raise UnreadableError(f"{parser.peek().text!r} where nothing can follow")
    _check_depth(node)
    return node


class _AnswerParser(ExpressionParser):
    def items(self, _closer: str) -> Node:
        """One clause, or a bare list of them."""
        clauses = [self._clause()]
        separators = []
        while self.at_op(",", ";") or self.peek().kind == "separator":
            separators.append(self.take().text)
            # An Oxford comma: "1, 2, and 3".
            while separators[-1] in ",;" and self.peek().kind == "separator":
                separators[-1] = self.take().text
            if separators[-1] in ",;" and self._ends_list():
                separators.pop()
                break
            clauses.append(self._clause())
        # "k in Z" after a comma says what a letter stands for.
        clauses = [clauses[0], *(clause for clause in clauses[1:] if not _is_declaration(clause))]
        if len(clauses) == 1:
            return clauses[0]
        if all(clause.kind == "rel" for clause in clauses) and len(set(separators)) == 1:
            if separators[0] in ("and", "or"):
                return Node(separators[0], tuple(clauses))
        return Node("seq", tuple(clauses))

    def _ends_list(self) -> bool:
        return self.peek().kind == "end" or self.at_op(")", "]", "}", "\\}", "&", "\\\\")

    def _clause(self) -> Node:
        sides, operators = [self._side()], []
        while self.at_op(*_RELATIONS) or self.at_command("in"):
            operators.append(self.take().text)
            sides.append(self._side())
        return Node("rel", tuple(sides), tuple(operators)) if operators else sides[0]

    def _side(self) -> Node:
        node = self._set_operand()
        while True:
            token = self.peek()
            if token.kind == "command" and token.text in _SET_OPERATORS:
                self.take()
                node = Node(_SET_OPERATORS[token.text], (node, self._set_operand()))
            elif token.text == "U" and is_set(node):
                self.take()
                node = Node("union", (node, self._set_operand()))
            else:
                break
        return self._with_unit(node)

    def _set_operand(self) -> Node:
        node = self.expression()
        if self.at_command("choose"):
            self.take()
            return Node("call", (node, self.expression()), "binom")
        if self.at_command("over"):
            self.take()
            return Node("div", (node, self.expression()))
        if node.kind == "add" and is_set(node.args[0]):
            return _set_difference(node)
        return node

    def _with_unit(self, node: Node) -> Node:
        """The quantity, where words or units follow a value."""
        pieces: list[str] = []
        if self.peek().kind == "text":
            while not self._ends_unit():
                token = self.take()
                if not _may_be_in_unit(token, pieces):
                    raise UnreadableError(f"{token.text!r} in a unit")
                pieces.append(token.text)
        return Node("quantity", (node,), " ".join(pieces)) if pieces else node

    def _ends_unit(self) -> bool:
        token = self.peek()
        return (
            token.kind in ("end", "separator", "command")
            or (token.kind == "op" and token.text not in ("^", "/", "*", "-", "{", "}", "'"))
            or (token.text == "}" and not self.in_unit_braces())
        )

    def in_unit_braces(self) -> bool:
        """Whether a closing brace here closes an exponent of the unit."""
        depth = 0
        for token in reversed(self.tokens[: self.at]):
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            if token.kind == "text":
                break
        return depth > 0


def _may_be_in_unit(token: Token, before: list[str]) -> bool:
    if token.kind == "text":
        is_power = bool(before) and token.text in ("squared", "cubed")
        return is_power or not is_unit_stop(token.text)
    last = before[-1]
    if token.kind == "number" or token.text == "-":
        return last in ("^", "{", "-")
    return token.kind == "op" or last in ("/", "*")


def is_set(node: Node) -> bool:
    """Whether a tree can only be a set: an interval, braces, a named set, a set operation."""
    if node.kind == "seq":
        return node.value == "{}" or (len(node.args) == 2 and node.value not in ("", "<>"))
    return node.kind in ("set", "union", "intersection", "difference", "builder")


def _set_difference(node: Node) -> Node:
    """`R - {0}`, where it was read as a sum."""
    result, *others = node.args
    for other in others:
        if other.kind != "neg" or not is_set(other.args[0]):
            return node
        result = Node("difference", (result, other.args[0]))
    return result


def _is_declaration(clause: Node) -> bool:
    return clause.kind == "rel" and clause.operators == ("in",) and clause.args[1].kind == "set"


def _check_depth(node: Node) -> None:
    level, depth = [node], 0
    while level:
        depth += 1
        if depth > MAX_TREE_DEPTH:
            raise TooCostlyError(f"nested deeper than {MAX_TREE_DEPTH}")
        level = [arg for part in level for arg in part.args]
