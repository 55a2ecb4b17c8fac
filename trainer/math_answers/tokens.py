"""Cuts an answer, LaTeX or plain text, into tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from trainer.math_answers.tree import TooCostlyError, UnreadableError
from trainer.math_answers.vocabulary import (
    DROPPED_COMMANDS,
    OPERATOR_COMMANDS,
    RENAMED_COMMANDS,
    SEPARATORS,
    SPACE_COMMANDS,
    TEXT_COMMANDS,
    WORD_COMMANDS,
    is_unit_word,
)

MAX_TOKENS = 1500
MAX_TEXT_NESTING = 4
MAX_DECIMAL_EXPONENT = 1000


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer.

    Kinds: number, letter (a variable), command (without its backslash; also plain words of the
    same meaning), text (words), separator ("and", "or"), op (a character or a relation), end.
    """

    kind: str
    text: str
    value: Fraction | None = None
    is_spaced: bool = False
    """White space stands before it."""


END = Token("end", "")

_NUMBER = re.compile(
    r"(?P<repeating>(?P<head>\d*\.\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(?P<bar>\d+)\}|(?P<one>\d))"
    r"|\((?P<paren>\d+)\)))"
    r"|(?P<endless>\d*\.\d+)\s*(?:\\[lc]?dots(?![A-Za-z])|\.\.\.)"
    r"|(?P<scientific>(?:\d+(?:\.\d+)?|\.\d+)[eE][+-]?\d{1,9})(?![\d.A-Za-z^])"
    r"|(?P<spaced>\d{1,3}(?: \d{3})+(?![\d ]))"
    r"|(?P<plain>\d+(?:\.\d+)?|\.\d+)",
    re.ASCII,
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])", re.ASCII)
_TWO_DOTS = re.compile(r"(\d*\.\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", re.ASCII)
_PIECE = re.compile(
    r"(?P<space>\s+|~|\\[,;:! ]|\\>)|(?P<command>\\(?:[A-Za-z]+\*?|[^A-Za-z]))|(?P<word>[A-Za-z]+)"
    r"|(?P<op>\*\*|<=|>=|!=|==|=<|=>|->|\.\.\.|[-+*/^_!'=<>()\[\]{},;:|%&])"
)
_FUNCTION_PREFIX = re.compile(r"(sin|cos|tan|cot|sec|csc|ln|log|sqrt)([a-zA-Z]{1,2})")
_DIGIT_OR_SYMBOL = re.compile(r"[\d+=<>^*/\\()\[\]]")
_UNIT_QUOTIENT = re.compile(r"(?:m|g|L|N|J|W|V|C)\s*/\s*(?:s|h|m|g|L|kg|cm|min|mol|mL)(?![A-Za-z])")
_UNIT_FORMULA = re.compile(r"[A-Za-z][A-Za-z0-9 /^.-]+")
_RELATION_SPELLINGS = {"==": "=", "=<": "<=", "**": "^"}


def tokenise(text: str, *, thousands: bool = True) -> list[Token]:
    """The tokens of a text, without an end mark.

    Args:
        text: normalised as `reading` does.
        thousands: read `1,234` outside brackets as one number, not as a list of two.

    Raises:
        UnreadableError: a character that no mathematics is written with, unclosed \\text.
        TooCostlyError: too many tokens, or a number with too large an exponent.
    """
    return _Tokeniser(text, thousands, nesting=0).run()


class _Tokeniser:
    def __init__(self, text: str, thousands: bool, nesting: int) -> None:
        if nesting > MAX_TEXT_NESTING:
            raise TooCostlyError(f"text commands nested deeper than {MAX_TEXT_NESTING}")
        self._text = text
        self._nesting = nesting
        self._thousands = thousands
        self._at = 0
        self._depth = 0
        self._spaced = False
        self._tokens: list[Token] = []

    def run(self) -> list[Token]:
        while self._at < len(self._text):
            if not self._number():
                self._piece()
            if len(self._tokens) > MAX_TOKENS:
                raise TooCostlyError(f"more than {MAX_TOKENS} tokens")
        return self._tokens

    def _add(self, kind: str, text: str, value: Fraction | None = None) -> None:
        self._tokens.append(Token(kind, text, value, self._spaced))
        self._spaced = False
        if kind == "op":
            self._depth += (text in "([{") - (text in ")]}")

    def _number(self) -> bool:
        match = _TWO_DOTS.match(self._text, self._at)
        if match is not None:
            head, first, middle, last = match.groups()
            value: Fraction | None = _repeating(head, first + middle + last)
        elif (
            self._thousands and self._depth == 0 and (match := self._thousands_match()) is not None
        ):
            value = Fraction(match.group().replace(",", ""))
        else:
            match = _NUMBER.match(self._text, self._at)
            value = None if match is None else _number_value(match)
        if match is None or value is None:
            return False
        self._at = match.end()
        self._add("number", match.group(), value)
        return True

    def _thousands_match(self) -> re.Match[str] | None:
        before = self._text[self._at - 1] if self._at else ""
        return (
            None if before in "0123456789,." and before else _THOUSANDS.match(self._text, self._at)
        )

    def _piece(self) -> None:
        match = _PIECE.match(self._text, self._at)
        if match is None:
            raise UnreadableError(f"the character {self._text[self._at]!r}")
        self._at = match.end()
        kind, piece = match.lastgroup, match.group()
        if kind == "space":
            self._spaced = True
        elif kind == "word":
            self._word(piece)
        elif kind == "op":
            self._add("op", _RELATION_SPELLINGS.get(piece, piece))
        else:
            self._command(piece[1:].rstrip("*"))

    def _word(self, word: str) -> None:
        last = self._tokens[-1] if self._tokens else END
        prefix = _FUNCTION_PREFIX.fullmatch(word)
        if _ends_a_value(last) and self._is_unit(word):
            self._add("text", word)
        elif word.lower() in SEPARATORS:
            self._add("separator", word.lower())
        elif word in WORD_COMMANDS:
            self._command(WORD_COMMANDS[word])
        elif len(word) > 1 and last.kind == "op" and last.text == "_":
            self._add("text", word)
        elif prefix is not None:
            self._command(prefix[1])
            self._word(prefix[2])
        elif len(word) > 1 and is_unit_word(word, after_number=_ends_a_value(last)):
            self._add("text", word)
        else:
            for letter in word:
                self._add("letter", letter)

    def _is_unit(self, word: str) -> bool:
        """Units that could be something else: `30 min`, `5 in`, `3 m/s`."""
        following = self._text[self._at :]
        if word in ("min", "in"):
            return not following.lstrip().startswith(("(", "[", "\\"))
        return (
            len(word) == 1 and self._spaced and _UNIT_QUOTIENT.match(word + following) is not None
        )

    def _command(self, name: str) -> None:
        if name in ("begin", "end"):
            environment = self._group().rstrip("*")
            if name == "begin" and environment == "array":
                self._group()
            self._add("command", f"{name}:{environment}")
            return
        if name in ("color", "textcolor", "phantom", "tag", "label", "hspace", "vspace"):
            self._group()
            return
        name = RENAMED_COMMANDS.get(name, name)
        if name in SPACE_COMMANDS:
            self._spaced = True
        elif name in DROPPED_COMMANDS:
            if name in ("left", "right") and self._text.startswith(".", self._at):
                self._at += 1
        elif name in OPERATOR_COMMANDS:
            self._add("op", OPERATOR_COMMANDS[name])
        elif name in SEPARATORS:
            self._add("separator", name)
        elif name in TEXT_COMMANDS:
            self._text_group(self._group())
        elif len(name) == 1 and name.isalpha():
            self._add("letter", name)
        else:
            self._add("command", name)

    def _group(self) -> str:
        start = self._at + len(self._text[self._at :]) - len(self._text[self._at :].lstrip())
        if not self._text.startswith("{", start):
            raise UnreadableError("a text command without braces")
        depth = 0
        for end in range(start, len(self._text)):
            depth += {"{": 1, "}": -1}.get(self._text[end], 0)
            if depth == 0:
                self._at = end + 1
                return self._text[start + 1 : end]
        raise UnreadableError("an unclosed brace")

    def _text_group(self, content: str) -> None:
        words = re.sub(r"\s+|~|\\[,;:! ]", " ", content).strip()
        last = self._tokens[-1] if self._tokens else END
        if not words:
            self._spaced = True
        elif words.lower() in SEPARATORS:
            self._add("separator", words.lower())
        elif words in WORD_COMMANDS and not (words == "in" and _ends_a_value(last)):
            self._command(WORD_COMMANDS[words])
        elif words in ",;":
            self._add("op", words)
        elif _ends_a_value(last) and _UNIT_FORMULA.fullmatch(words):
            self._add("text", words)
        elif _DIGIT_OR_SYMBOL.search(words) or (words in ("e", "i", "d")):
            inner = _Tokeniser(words, self._thousands, self._nesting + 1)
            self._tokens.extend(inner.run())
        elif len(words) == 1 and words.isalpha() and not _ends_a_value(last):
            self._add("letter", words)
        else:
            self._add("text", words)


def _ends_a_value(token: Token) -> bool:
    return token.kind in ("number", "text") or token.text in (")", "}", "]", "|", "pi", "%")


def _number_value(match: re.Match[str]) -> Fraction | None:
    if match["repeating"] is not None:
        return _repeating(match["head"], match["bar"] or match["one"] or match["paren"])
    if match["endless"] is not None:
        return _endless(match["endless"])
    if match["scientific"] is not None:
        mantissa, _, exponent = match["scientific"].lower().partition("e")
        if abs(int(exponent)) > MAX_DECIMAL_EXPONENT:
            raise TooCostlyError(f"an exponent beyond {MAX_DECIMAL_EXPONENT}")
        return Fraction(mantissa) * Fraction(10) ** int(exponent)
    return Fraction(match.group().replace(" ", ""))


def _repeating(head: str, period: str) -> Fraction:
    decimals = len(head.partition(".")[2])
    nines = 10 ** len(period) - 1
    start = Fraction(head.rstrip(".") or "0") if head != "." else Fraction(0)
    return start + Fraction(int(period), nines * 10**decimals)


def _endless(digits: str) -> Fraction:
    """The value of `0.333...`, where the last digits have been written three times or more."""
    whole, _, decimals = digits.partition(".")
    for length in range(1, len(decimals) // 3 + 1):
        period = decimals[-length:]
        if decimals.endswith(period * 3):
            return _repeating(f"{whole}.{decimals[:-length]}", period)
    raise UnreadableError("an endless decimal whose period does not show")
