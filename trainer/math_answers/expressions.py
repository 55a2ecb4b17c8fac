"""The grammar of expressions: numbers, variables, functions, roots, fractions, matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

from trainer.math_answers.tokens import END, Token
from trainer.math_answers.tree import (
    Node,
    TooCostlyError,
    UnreadableError,
    UnsupportedError,
    integer,
    walk,
)
from trainer.math_answers.vocabulary import FUNCTIONS, GREEK

MAX_NESTING = 40
MAX_MARKS = 12
"""Signs in a row before a value, and marks such as ! and ' in a row after it."""

_NEEDS_ALGEBRA = frozenset("int lim partial nabla iint iiint oint limsup liminf".split())
_INVERSES = {name: f"arc{name}" for name in "sin cos tan cot sec csc sinh cosh tanh".split()}
_DECORATIONS = frozenset("hat bar overline tilde dot ddot vec widehat check".split())
_FUNCTION_LETTERS = ("f", "g", "h", "F", "G")
_ENCLOSURES = {"lfloor": ("floor", "rfloor"), "lceil": ("ceil", "rceil")}
_NAMES = GREEK | frozenset(
    "angle triangle square perp parallel infty nabla star dagger circ odot oplus otimes top bot "
    "Box Diamond Re Im aleph forall exists mho".split()
)
_VALUE_COMMANDS = (
    FUNCTIONS
    | GREEK
    | _DECORATIONS
    | frozenset(
        "frac sqrt cbrt binom pi angle triangle square langle lfloor lceil sum prod mathbb boxed "
        "underline emptyset odot mho star".split()
    )
)


class ExpressionParser(ABC):
    """Descends over tokens; a subclass says what stands between brackets."""

    def __init__(self, tokens: list[Token], tight: bool) -> None:
        self.tokens = tokens
        self.at = 0
        self._tight = tight
        self._nesting = 0
        self._bar_stops = 0
        self._colon_stops = 0

    @abstractmethod
    def items(self, closer: str) -> Node:
        """A clause or a bare list of clauses, up to a closing bracket or the end."""

    def peek(self, ahead: int = 0) -> Token:
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def take(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def at_op(self, *texts: str) -> bool:
        token = self.peek()
        return token.kind == "op" and token.text in texts

    def at_command(self, *texts: str) -> bool:
        token = self.peek()
        return token.kind == "command" and token.text in texts

    def expect(self, text: str) -> None:
        if self.peek().kind not in ("op", "command") or self.peek().text != text:
            raise UnreadableError(f"expected {text!r}, got {self.peek().text!r}")
        self.at += 1

    def expression(self) -> Node:
        """Terms joined by + - and plus-or-minus."""
        terms = [self._signed_term()]
        while self.at_op("+", "-") or self.at_command("pm", "mp"):
            if self.peek().text == "+":
                self.take()
            terms.append(self._signed_term())
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _signed_term(self) -> Node:
        signs = self._signs()
        return _signed(self._ratio(), signs)

    def _signs(self) -> list[str]:
        signs = []
        while self.at_op("+", "-") or self.at_command("pm", "mp"):
            signs.append(self.take().text)
        if len(signs) > MAX_MARKS:
            raise TooCostlyError(f"more than {MAX_MARKS} signs in a row")
        return signs

    def _ratio(self) -> Node:
        parts = [self._term()]
        while self.at_op(":") and not self._colon_stops:
            self.take()
            parts.append(self._term())
        node = parts.pop()
        while parts:
            node = Node("ratio", (parts.pop(), node))
        return node

    def _term(self) -> Node:
        factors = [self._factor()]
        while True:
            if self.at_op("*"):
                self.take()
                factors.append(self._signed_factor())
            elif self.at_op("/"):
                self.take()
                divisor = self._signed_factor()
                if self._tight:
                    divisor = self._with_implicit_factors(divisor)
                factors.append(Node("inv", (divisor,)))
            elif self.at_command("bmod"):
                self.take()
                factors = [Node("call", (_product(factors), self._signed_factor()), "mod")]
            elif self._starts_factor():
                factors = self._with_factor(factors)
            else:
                return _product(factors)

    def _with_factor(self, factors: list[Node]) -> list[Node]:
        """The factors with the next, which stands there without a sign of multiplication."""
        follows_number = self.peek(-1).kind == "number"
        if follows_number and self.peek().kind == "number":
            return [*factors[:-1], self._plain_mixed_number(factors[-1])]
        is_fraction = self.at_command("frac")
        factor = self._factor()
        # A percent sign or a degree sign belongs to the whole mixed number.
        mark = factor.kind if factor.kind in ("percent", "deg") else ""
        fraction = factor.args[0] if mark else factor
        if follows_number and is_fraction and _is_proper(fraction) and _is_whole(factors[-1]):
            mixed = Node("add", (factors[-1], fraction))
            return [*factors[:-1], Node(mark, (mixed,)) if mark else mixed]
        return [*factors, factor]

    def _plain_mixed_number(self, whole: Node) -> Node:
        top, bar, bottom = self.take(), self.take(), self.take()
        if bar.text == "/" and bottom.kind == "number" and top.value and bottom.value:
            fraction = Node("div", (Node("num", value=top.value), Node("num", value=bottom.value)))
            if _is_proper(fraction) and _is_whole(whole):
                return Node("add", (whole, fraction))
        raise UnreadableError("two numbers in a row")

    def _with_implicit_factors(self, node: Node) -> Node:
        factors = [node]
        while self._starts_factor() and self.peek().kind != "number":
            factors.append(self._factor())
        return _product(factors)

    def _signed_factor(self) -> Node:
        signs = self._signs()
        return _signed(self._factor(), signs)

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "command":
            return token.text in _VALUE_COMMANDS or token.text.startswith("begin:")
        if token.kind == "op":
            return token.text in ("(", "[", "{", "\\{") or (
                token.text == "|" and not self._bar_stops
            )
        if token.text == "U" and self.peek(1).text in ("(", "[", "{", "\\{"):
            return self.peek(-1).text not in (")", "]", "}", "\\}")
        return token.kind in ("number", "letter")

    def _factor(self) -> Node:
        """A primary with its subscripts, powers, factorials, primes, degrees and percent signs."""
        node = self._with_argument(self._primary())
        marks = 0
        while True:
            marks += 1
            if marks > MAX_MARKS:
                raise TooCostlyError(f"more than {MAX_MARKS} marks after a value")
            if self.at_op("!"):
                self.take()
                node = Node("call", (node,), "factorial")
            elif self.at_op("'"):
                self.take()
                node = _primed(node)
            elif self.at_op("%"):
                self.take()
                node = Node("percent", (node,))
            elif self.at_command("deg", "circ"):
                self.take()
                node = self._degrees(node)
            elif self.at_op("^"):
                self.take()
                node = self._power(node)
            elif self.at_op("_"):
                self.take()
                node = self._with_argument(self._subscripted(node))
            else:
                return node

    def _with_argument(self, node: Node) -> Node:
        """`I(0)` is a name, not a product with zero."""
        is_applied = self.at_op("(") and self.peek(1).kind == "number" and self.peek(2).text == ")"
        if node.kind != "sym" or not is_applied:
            return node
        argument = self.peek(1).text
        self.at += 3
        return Node("sym", value=f"{node.value}({argument})")

    def _power(self, base: Node) -> Node:
        if self._script_is("circ", "deg", "o"):
            return self._degrees(base)
        if self._script_is("'"):
            return _primed(base)
        if self._script_is("T", "top"):
            return Node("call", (base,), "transpose")
        exponent = self._script()
        is_inverse = exponent == Node("neg", (integer(1),)) and self.at_op("(")
        if is_inverse and base.value in _FUNCTION_LETTERS:
            return Node("sym", value=f"inverse {base.value}")
        return Node("pow", (base, exponent))

    def _script_is(self, *texts: str) -> bool:
        """Take a script that is only one of these, with or without braces; repeated primes too."""
        braces = 1 if self.at_op("{") else 0
        length = 1
        while texts == ("'",) and self.peek(braces + length).text == "'":
            length += 1
        is_script = self.peek(braces).text in texts and (
            not braces or self.peek(braces + length).text == "}"
        )
        if is_script:
            self.at += length + 2 * braces
        return is_script

    def _degrees(self, value: Node) -> Node:
        if self.peek().text in ("C", "F") and self.peek().kind in ("letter", "text"):
            scale = "celsius" if self.take().text == "C" else "fahrenheit"
            return Node("quantity", (value,), scale)
        return Node("deg", (value,))

    def _script(self) -> Node:
        """An exponent: braces, or one primary, which may have a sign and an exponent of its own."""
        signs = self._signs()
        has_braces = self.at_op("{")
        node = self._primary()
        if self.at_op("!"):
            self.take()
            node = Node("call", (node,), "factorial")
        if not has_braces and self.at_op("^"):
            self.take()
            with self._deeper():
                node = self._power(node)
        return _signed(node, signs)

    def _subscripted(self, node: Node) -> Node:
        label = self._label()
        if node.kind == "sym":
            return Node("sym", value=f"{node.value}_{label}")
        if node.kind == "num" and label:
            return Node("based", value=(str(node.value), label))
        if node.kind in ("const", "pow"):
            return Node("sym", value=f"{_label_of(node)}_{label}")
        raise UnreadableError("a subscript of something that is no variable")

    def _label(self) -> str:
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

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise TooCostlyError(f"nested deeper than {MAX_NESTING}")
        yield
        self._nesting -= 1

    def _primary(self) -> Node:
        with self._deeper():
            return self._unmarked(self.take())

    def _unmarked(self, token: Token) -> Node:
        if token.kind == "number":
            return Node("num", value=token.value if token.value is not None else Fraction(0))
        if token.kind == "letter":
            return self._letter(token.text)
        if token.kind == "text":
            return Node("sym", value=" ".join(token.text.lower().split()))
        if token.kind == "command":
            return self._command_value(token.text)
        if token.kind == "op" and token.text in ("(", "[", "{", "\\{"):
            return self._bracketed(token.text)
        if token.text == "|":
            return self._absolute_value()
        if token.text == "...":
            return Node("ellipsis")
        raise UnreadableError(f"{token.text!r} where a value is expected")

    def _letter(self, name: str) -> Node:
        has_label = self.at_op("_")
        if name in ("e", "i") and not has_label:
            return Node("const", value=name)
        return Node("sym", value=name)

    def _absolute_value(self) -> Node:
        self._bar_stops += 1
        inner = self.expression()
        self._bar_stops -= 1
        self.expect("|")
        if inner.kind == "seq":
            squares = tuple(Node("pow", (part, integer(2))) for part in inner.args)
            return Node("root", (Node("add", squares), integer(2)))
        return Node("call", (inner,), "abs")

    def _bracketed(self, opening: str) -> Node:
        bars, self._bar_stops = self._bar_stops, 1 if opening in ("\\{", "{") else 0
        colons, self._colon_stops = self._colon_stops, 1 if opening in ("\\{", "{") else 0
        if opening == "\\{" and self.at_op("\\}"):
            node = Node("set", value="empty")
        else:
            node = self.items(opening)
        if opening in ("\\{", "{") and self.at_op("|", ":"):
            self.take()
            node = Node("builder", (node, self.items(opening)))
        self._bar_stops, self._colon_stops = bars, colons
        return _enclosed(node, opening, self.take())

    def _command_value(self, name: str) -> Node:
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
        if name in _ENCLOSURES:
            function, closer = _ENCLOSURES[name]
            inner = self.expression()
            self.expect(closer)
            return Node("call", (inner,), function)
        if name == "langle":
            inner = self.items("rangle")
            self.expect("rangle")
            return Node("seq", inner.args if _is_list(inner) else (inner,), "<>")
        if name == "emptyset":
            return Node("set", value="empty")
        if name == "mathbb":
            return Node("set", value=self._label())
        if name in ("boxed", "underline"):
            return self._argument()
        if name in _DECORATIONS:
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
        return self._primary()

    def _fraction(self) -> Node:
        if self.peek(1).text in ("d", "partial") and self.at_op("{"):
            return self._derivative()
        return Node("div", (self._argument(), self._argument()))

    def _derivative(self) -> Node:
        start = self.at
        top = self._label()
        bottom = self._label() if self.at_op("{") else ""
        if len(bottom) > 1 and bottom[0] in ("d", "p"):
            if len(top) == 1:
                raise UnsupportedError("a derivative")
            return Node("sym", value=f"{top}/{bottom}")
        self.at = start
        return Node("div", (self._argument(), self._argument()))

    def _root(self, name: str) -> Node:
        degree = integer(3 if name == "cbrt" else 2)
        if self.at_op("["):
            self.take()
            degree = self.expression()
            self.expect("]")
        return Node("root", (self._primary(), degree))

    def _binomial(self) -> Node:
        if self.at_op("("):
            arguments = self._primary()
            if arguments.kind != "seq" or len(arguments.args) != 2:
                raise UnreadableError("a binomial without two arguments")
            return Node("call", arguments.args, "binom")
        return Node("call", (self._argument(), self._argument()), "binom")

    def _big_operator(self, name: str) -> Node:
        self.expect("_")
        self.expect("{")
        index = self._primary()
        self.expect("=")
        first = self.expression()
        self.expect("}")
        self.expect("^")
        last = self._script()
        variable = str(index.value)
        if index.kind not in ("sym", "const"):
            raise UnreadableError("an index that is no variable")
        if any(part == Node("const", value="oo") for part in (*walk(first), *walk(last))):
            raise UnsupportedError(f"an infinite \\{name}")
        body = _with_index(self._term(), index, variable)
        return Node(name, (first, last, body), variable)

    def _function(self, name: str) -> Node:
        power = base = None
        while self.at_op("^", "_"):
            if self.take().text == "^":
                power = self._script()
            else:
                base = self._script()
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
            inner = self._primary()
            if inner.kind == "seq" and inner.value in ("()", "{}"):
                return inner.args
            return (inner,)
        factors = [self._signed_factor()]
        while self._starts_factor() and not (
            self.peek().kind == "command" and self.peek().text in FUNCTIONS
        ):
            factors = self._with_factor(factors)
        if self._tight and self.at_op("/"):
            self.take()
            factors.append(Node("inv", (self._factor(),)))
        return (_product(factors),)

    def _decorated(self, decoration: str) -> Node:
        if not self.at_op("{"):
            return Node("sym", value=f"{decoration} {self.take().text}")
        start = self.at
        inner = self._primary()
        if inner.kind == "num":
            return inner
        self.at = start
        label = self._label()
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
        if name == "cases":
            return Node("cases", tuple(Node("seq", tuple(row)) for row in rows))
        if not rows or len({len(row) for row in rows}) != 1:
            raise UnreadableError("a matrix with rows of different lengths")
        cells = tuple(cell for row in rows for cell in row)
        matrix = Node("matrix", cells, len(rows[0]))
        return Node("call", (matrix,), "det") if name == "vmatrix" else matrix


def _signed(node: Node, signs: list[str]) -> Node:
    for sign in reversed(signs):
        if sign != "+":
            node = Node("neg" if sign == "-" else sign, (node,))
    return node


def _product(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def _is_list(node: Node) -> bool:
    return node.kind == "seq" and node.value == ""


def _enclosed(node: Node, opening: str, closing: Token) -> Node:
    pairs = {"(": ")]", "[": "])", "{": "}", "\\{": "\\}"}
    if closing.kind != "op" or closing.text not in (
        (pairs[opening],) if "\\" in opening else pairs[opening]
    ):
        raise UnreadableError(f"{opening!r} closed by {closing.text!r}")
    if opening == "\\{":
        if node.kind == "builder" or (node.kind, node.value) == ("set", "empty"):
            return node
        return Node("seq", node.args if _is_list(node) else (node,), "{}")
    if not _is_list(node):
        return node
    return Node("seq", node.args, opening + closing.text)


def _is_whole(node: Node) -> bool:
    return node.kind == "num" and isinstance(node.value, Fraction) and node.value.denominator == 1


def _is_proper(node: Node) -> bool:
    if node.kind != "div" or not all(_is_whole(part) for part in node.args):
        return False
    top, bottom = (part.value for part in node.args)
    assert isinstance(top, Fraction) and isinstance(bottom, Fraction)
    return top < bottom


def _primed(node: Node) -> Node:
    if node.kind == "sym":
        return Node("sym", value=f"{node.value}'")
    if node.kind in ("num", "deg") or (node.kind == "quantity" and node.value == "prime"):
        return Node("quantity", (node,), "prime")
    raise UnreadableError("a prime after something that is no variable")


def _label_of(node: Node) -> str:
    return str(node.value) if not node.args else "".join(_label_of(arg) for arg in node.args)


def _with_index(node: Node, index: Node, variable: str) -> Node:
    """The body of a sum with its index as a variable, also where that is the letter i."""
    if node == index:
        return Node("sym", value=variable)
    return replace(node, args=tuple(_with_index(arg, index, variable) for arg in node.args))
