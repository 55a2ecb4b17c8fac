"""The grammar of expressions: signs, products, powers and other marks, brackets."""

from __future__ import annotations

from fractions import Fraction

from trainer.math_answers.constructs import DECORATIONS, ConstructParser, is_list, product
from trainer.math_answers.tokens import Token
from trainer.math_answers.tree import Node, TooCostlyError, UnreadableError, integer
from trainer.math_answers.vocabulary import FUNCTIONS, GREEK

MAX_MARKS = 12
"""Signs in a row before a value, and marks such as ! and ' in a row after it."""

_FUNCTION_LETTERS = ("f", "g", "h", "F", "G")
_VALUE_COMMANDS = (
    FUNCTIONS
    | GREEK
    | DECORATIONS
    | frozenset(
        "frac sqrt cbrt binom pi angle triangle square langle lfloor lceil int sum prod mathbb "
        "boxed underline emptyset odot mho star".split()
    )
)


class ExpressionParser(ConstructParser):
    """Descends over tokens; a subclass says what stands between brackets."""

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
        parts = [self.term()]
        while self.at_op(":") and not self.colon_stops:
            self.take()
            parts.append(self.term())
        node = parts.pop()
        while parts:
            node = Node("ratio", (parts.pop(), node))
        return node

    def term(self) -> Node:
        factors = [self.factor()]
        while True:
            if self.at_op("*"):
                self.take()
                factors.append(self.signed_factor())
            elif self.at_op("/"):
                self.take()
                divisor = self.signed_factor()
                if self.tight:
                    divisor = self._with_implicit_factors(divisor)
                factors.append(Node("inv", (divisor,)))
            elif self.at_command("bmod"):
                self.take()
                factors = [Node("call", (product(factors), self.signed_factor()), "mod")]
            elif self.starts_factor():
                factors = self.with_factor(factors)
            else:
                return product(factors)

    def with_factor(self, factors: list[Node]) -> list[Node]:
        """The factors with the next, which stands there without a sign of multiplication."""
        follows_number = self.peek(-1).kind == "number"
        if follows_number and self.peek().kind == "number":
            return [*factors[:-1], self._plain_mixed_number(factors[-1])]
        is_fraction = self.at_command("frac")
        factor = self.factor()
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
        while self.starts_factor() and self.peek().kind != "number":
            factors.append(self.factor())
        return product(factors)

    def signed_factor(self) -> Node:
        signs = self._signs()
        return _signed(self.factor(), signs)

    def starts_factor(self) -> bool:
        token = self.peek()
        if self.integrals and self.at_differential():
            return False
        if token.kind == "command":
            return token.text in _VALUE_COMMANDS or token.text.startswith("begin:")
        if token.kind == "op":
            return token.text in ("(", "[", "{", "\\{") or (
                token.text == "|" and not self.bar_stops
            )
        if token.text == "U" and self.peek(1).text in ("(", "[", "{", "\\{"):
            return self.peek(-1).text not in (")", "]", "}", "\\}")
        return token.kind in ("number", "letter")

    def factor(self) -> Node:
        """A primary with its subscripts, powers, factorials, primes, degrees and percent signs."""
        node = self._with_argument(self.primary())
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
        exponent = self.script()
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

    def script(self) -> Node:
        """An exponent: braces, or one primary, which may have a sign and an exponent of its own."""
        signs = self._signs()
        has_braces = self.at_op("{")
        node = self.primary()
        if self.at_op("!"):
            self.take()
            node = Node("call", (node,), "factorial")
        if not has_braces and self.at_op("^"):
            self.take()
            with self.deeper():
                node = self._power(node)
        return _signed(node, signs)

    def _subscripted(self, node: Node) -> Node:
        label = self.label()
        if node.kind == "sym":
            return Node("sym", value=f"{node.value}_{label}")
        if node.kind == "num" and label:
            return Node("based", value=(str(node.value), label))
        if node.kind in ("const", "pow"):
            return Node("sym", value=f"{_label_of(node)}_{label}")
        raise UnreadableError("a subscript of something that is no variable")

    def primary(self) -> Node:
        with self.deeper():
            return self._unmarked(self.take())

    def _unmarked(self, token: Token) -> Node:
        if token.kind == "number":
            return Node("num", value=token.value if token.value is not None else Fraction(0))
        if token.kind == "letter":
            return self._letter(token.text)
        if token.kind == "text":
            return Node("sym", value=" ".join(token.text.lower().split()))
        if token.kind == "command":
            return self.command_value(token.text)
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
        self.bar_stops += 1
        inner = self.expression()
        self.bar_stops -= 1
        self.expect("|")
        if inner.kind == "matrix":
            return Node("call", (inner,), "det")
        if inner.kind == "seq":
            squares = tuple(Node("pow", (part, integer(2))) for part in inner.args)
            return Node("root", (Node("add", squares), integer(2)))
        return Node("call", (inner,), "abs")

    def _bracketed(self, opening: str) -> Node:
        bars, self.bar_stops = self.bar_stops, 1 if opening in ("\\{", "{") else 0
        colons, self.colon_stops = self.colon_stops, 1 if opening in ("\\{", "{") else 0
        if opening == "\\{" and self.at_op("\\}"):
            node = Node("set", value="empty")
        else:
            node = self.items(opening)
        if opening in ("\\{", "{") and self.at_op("|", ":"):
            self.take()
            node = Node("builder", (node, self.items(opening)))
        self.bar_stops, self.colon_stops = bars, colons
        return _enclosed(node, opening, self.take())


def _signed(node: Node, signs: list[str]) -> Node:
    for sign in reversed(signs):
        if sign == "-" and node.kind in ("percent", "deg"):
            node = Node(node.kind, (Node("neg", node.args),))
        elif sign != "+":
            node = Node("neg" if sign == "-" else sign, (node,))
    return node


def _enclosed(node: Node, opening: str, closing: Token) -> Node:
    pairs = {"(": ")]", "[": "])", "{": "}", "\\{": "\\}"}
    if closing.kind != "op" or closing.text not in (
        (pairs[opening],) if "\\" in opening else pairs[opening]
    ):
        raise UnreadableError(f"{opening!r} closed by {closing.text!r}")
    if opening == "\\{":
        if node.kind == "builder" or (node.kind, node.value) == ("set", "empty"):
            return node
        return Node("seq", node.args if is_list(node) else (node,), "{}")
    if not is_list(node):
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
