"""The grammar of what a command starts: fractions, roots, functions, sums, integrals, matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from fractions import Fraction

from trainer.math_answers.token_stream import TokenStream
from trainer.math_answers.tree import Node, UnreadableError, UnsupportedError, integer, walk
from trainer.math_answers.vocabulary import FUNCTIONS, GREEK

_NEEDS_ALGEBRA = frozenset("lim partial nabla iint iiint oint limsup liminf".split())
_INVERSES = {name: f"arc{name}" for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
DECORATIONS = frozenset("hat bar overline tilde dot ddot vec widehat check".split())
_ENCLOSURES = {"lfloor": ("floor", "rfloor"), "lceil": ("ceil", "rceil")}
_NAMES = GREEK | frozenset(
    "angle triangle square perp parallel infty nabla star dagger circ odot oplus otimes top bot "
    "Box Diamond Re Im aleph forall exists mho".split()
)


class ConstructParser(TokenStream, ABC):
    """Reads what follows a command; subclasses read everything else."""

    @abstractmethod
    def items(self, closer: str) -> Node:
        """A clause or a bare list of clauses, up to a closing bracket or the end."""

    @abstractmethod
    def expression(self) -> Node:
        """Terms joined by signs."""

    @abstractmethod
    def term(self) -> Node:
        """Factors joined by signs of multiplication, or by none."""

    @abstractmethod
    def with_factor(self, factors: list[Node]) -> list[Node]:
        """The factors with the next, which stands there without a sign of multiplication."""

    @abstractmethod
    def signed_factor(self) -> Node:
        """A factor, which may have signs."""

    @abstractmethod
    def factor(self) -> Node:
        """A primary with its marks."""

    @abstractmethod
    def starts_factor(self) -> bool:
        """Whether a factor starts here."""

    @abstractmethod
    def script(self) -> Node:
        """An exponent or a base: braces, or one primary."""

    @abstractmethod
    def primary(self) -> Node:
        """A number, a letter, a command with its arguments, a bracket."""

    def command_value(self, name: str) -> Node:
        if name in FUNCTIONS:
            return self._function(name)
        if name == "pi":
            return Node("const", value="pi")
        if name == "infty":
            return Node("const", value="oo")
        if name == "frac":
            return self._fraction()
        if name in ("sqrt", "cbrt"):
            return self._root(name)
        if name == "binom":
            return self._binomial()
        if name in ("sum", "prod"):
            return self._big_operator(name)
        if name == "int":
            return self._integral()
        if name in _ENCLOSURES:
            function, closer = _ENCLOSURES[name]
            inner = self.expression()
            self.expect(closer)
            return Node("call", (inner,), function)
        if name == "langle":
            inner = self.items("rangle")
            self.expect("rangle")
            return Node("seq", inner.args if is_list(inner) else (inner,), "<>")
        if name == "emptyset":
            return Node("set", value="empty")
        if name == "mathbb":
            return Node("set", value=self.label())
        if name in ("boxed", "underline"):
            return self._argument()
        if name in DECORATIONS:
            return self._decorated(name)
        if name.startswith("begin:"):
            return self._environment(name.removeprefix("begin:"))
        if name in _NEEDS_ALGEBRA:
            raise UnsupportedError(f"\\{name}")
        if name in _NAMES:
            return Node("sym", value=name)
        raise UnsupportedError(f"the command \\{name}")

    def _argument(self) -> Node:
        """A group, or one token; of a number without braces one digit, as LaTeX reads it."""
        token = self.peek()
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1:
            self.tokens[self.at] = replace(
                token, text=token.text[1:], value=Fraction(token.text[1:])
            )
            return integer(int(token.text[0]))
        return self.primary()

    def _fraction(self) -> Node:
        if self.peek(1).text in ("d", "partial") and self.at_op("{"):
            return self._derivative()
        return Node("div", (self._argument(), self._argument()))

    def _derivative(self) -> Node:
        start = self.at
        top = self.label()
        bottom = self.label() if self.at_op("{") else ""
        if len(bottom) > 1 and bottom[0] in ("d", "p"):
            if top in ("d", "partial"):
                return Node("diff", (self.term(),), bottom.removeprefix(top))
            return Node("sym", value=f"{top}/{bottom}")
        self.at = start
        return Node("div", (self._argument(), self._argument()))

    def _root(self, name: str) -> Node:
        degree = integer(3 if name == "cbrt" else 2)
        if self.at_op("["):
            self.take()
            degree = self.expression()
            self.expect("]")
        return Node("root", (self.primary(), degree))

    def _binomial(self) -> Node:
        if self.at_op("("):
            arguments = self.primary()
            if arguments.kind != "seq" or len(arguments.args) != 2:
                raise UnreadableError("a binomial without two arguments")
            return Node("call", arguments.args, "binom")
        return Node("call", (self._argument(), self._argument()), "binom")

    def _big_operator(self, name: str) -> Node:
        self.expect("_")
        self.expect("{")
        index = self.primary()
        self.expect("=")
        first = self.expression()
        self.expect("}")
        self.expect("^")
        last = self.script()
        variable = str(index.value)
        if index.kind not in ("sym", "const"):
            raise UnreadableError("an index that is no variable")
        if any(part == Node("const", value="oo") for part in (*walk(first), *walk(last))):
            raise UnsupportedError(f"an infinite \\{name}")
        body = _with_index(self.term(), index, variable)
        return Node(name, (first, last, body), variable)

    def _integral(self) -> Node:
        limits: dict[str, Node] = {}
        while self.at_op("^", "_"):
            mark = self.take().text
            limits[mark] = self.primary()
        if len(limits) != 2:
            raise UnsupportedError("an integral without limits")
        self.integrals += 1
        body = integer(1) if self.at_differential() else self.expression()
        self.integrals -= 1
        if not self.at_differential():
            raise UnsupportedError("an integral over what is not shown")
        self.take()
        return Node("int", (limits["_"], limits["^"], body), self.take().text)

    def _function(self, name: str) -> Node:
        power = base = None
        while self.at_op("^", "_"):
            if self.take().text == "^":
                power = self.script()
            else:
                base = self.script()
        if power == Node("neg", (integer(1),)) and name in _INVERSES:
            name, power = _INVERSES[name], None
        node = Node("call", self._function_arguments(), name)
        if base is not None:
            if name != "log":
                raise UnreadableError(f"a subscript of \\{name}")
            node = Node("call", (*node.args, base), "log")
        return node if power is None else Node("pow", (node, power))

    def _function_arguments(self) -> tuple[Node, ...]:
        if self.at_op("(", "[", "{", "\\{"):
            inner = self.primary()
            if inner.kind == "seq" and inner.value in ("()", "{}"):
                return inner.args
            return (inner,)
        factors = [self.signed_factor()]
        while self.starts_factor() and not (
            self.peek().kind == "command" and self.peek().text in FUNCTIONS
        ):
            factors = self.with_factor(factors)
        if self.tight and self.at_op("/"):
            self.take()
            factors.append(Node("inv", (self.factor(),)))
        return (product(factors),)

    def _decorated(self, decoration: str) -> Node:
        if not self.at_op("{"):
            return Node("sym", value=f"{decoration} {self.take().text}")
        start = self.at
        inner = self.primary()
        if inner.kind == "num":
            return inner
        self.at = start
        label = self.label()
        return Node("sym", value=label if decoration == "vec" else f"{decoration} {label}")

    def _environment(self, name: str) -> Node:
        rows: list[list[Node]] = [[]]
        while not self.at_command(f"end:{name}"):
            if self.at_op("\\\\"):
                self.take()
                rows.append([])
            elif self.at_op("&"):
                self.take()
            else:
                rows[-1].append(self.items("end"))
                if not (self.at_op("\\\\", "&") or self.at_command(f"end:{name}")):
                    raise UnreadableError("an unclosed environment")
        self.take()
        rows = [row for row in rows if row]
        if name == "cases" and all(len(row) == 1 and row[0].kind == "rel" for row in rows):
            return Node("seq", tuple(row[0] for row in rows))
        if name == "cases":
            return Node("cases", tuple(Node("seq", tuple(row)) for row in rows))
        if not rows or len({len(row) for row in rows}) != 1:
            raise UnreadableError("a matrix with rows of different lengths")
        cells = tuple(cell for row in rows for cell in row)
        matrix = Node("matrix", cells, len(rows[0]))
        return Node("call", (matrix,), "det") if name == "vmatrix" else matrix

    def label(self) -> str:
        """The text of a subscript, which is part of a name."""
        if not self.at_op("{"):
            return self.take().text
        self.take()
        depth, pieces = 1, []
        while depth and self.peek().kind != "end":
            text = self.take().text
            depth += {"{": 1, "}": -1}.get(text, 0)
            pieces.append(text if text not in "{}" else "")
        if depth:
            raise UnreadableError("an unclosed brace")
        return "".join(pieces)


def product(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def is_list(node: Node) -> bool:
    return node.kind == "seq" and node.value == ""


def _with_index(node: Node, index: Node, variable: str) -> Node:
    """The body of a sum with its index as a variable, also where that is the letter i."""
    if node == index:
        return Node("sym", value=variable)
    return replace(node, args=tuple(_with_index(arg, index, variable) for arg in node.args))
