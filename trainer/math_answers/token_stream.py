"""Where a parser stands in its tokens, and how deep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.math_answers.tokens import END, Token
from trainer.math_answers.tree import TooCostlyError, UnreadableError

MAX_NESTING = 40


class TokenStream:
    """Tokens, a place among them, and what is enclosing it.

    Args:
        tokens: of one answer.
        tight: read `1/2x` as 1/(2x), not as (1/2)x.
    """

    def __init__(self, tokens: list[Token], tight: bool) -> None:
        self.tokens = tokens
        self.at = 0
        self.tight = tight
        self._nesting = 0
        self.bar_stops = 0
        self.colon_stops = 0
        self.integrals = 0

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

    def at_differential(self) -> bool:
        """Whether the dx of an integral stands here."""
        return self.peek().text == "d" and self.peek(1).kind == "letter"

    def expect(self, text: str) -> None:
        if self.peek().kind not in ("op", "command") or self.peek().text != text:
            raise UnreadableError(f"expected {text!r}, got {self.peek().text!r}")
        self.at += 1

    @contextmanager
    def deeper(self) -> Iterator[None]:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise TooCostlyError(f"nested deeper than {MAX_NESTING}")
        yield
        self._nesting -= 1
