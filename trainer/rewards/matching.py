"""Whether an answer equals the gold: normalised text first, then exact rational arithmetic.

No floating point, no evaluation of model text, no tolerance: 0.3333 is not 1/3, and 5\\% is not 5.
Every step is linear in the answer's length, and long answers are compared as they stand.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_ANSWER_CHARS = 2000
"""Longer answers are only compared character by character."""
MAX_NUMBER_CHARS = 500
"""Longer numbers are compared as text, which keeps big-integer work small."""

_MINUS_SIGN, _FRACTION_SLASH = "\u2212", "\u2044"
_DROPPED_LATEX = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\!|(?<=\d)\\,(?=\d{3}(?!\d))")
_SPACE_LATEX = re.compile(r"\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~")
_FRACTION_LATEX = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_CURRENCY = re.compile(r"^([+-]?)\\?\$(?=[\d.])")
_FINAL_STOP = re.compile(r"(?<=[\w})\]])\.$")
_SPACES = re.compile(r"\s+")
_REDUNDANT_SPACE = re.compile(r"(?<!\w) | (?!\w)")

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)({_NUMBER})(?:/([+-]?)({_NUMBER}))?", re.ASCII)
_LATEX = re.compile(
    rf"([+-]?)\\frac(?:(\d)(\d)|\{{([+-]?)({_NUMBER})\}}\{{([+-]?)({_NUMBER})\}})", re.ASCII
)


def answers_match(gold: str, answer: str) -> bool:
    """True when the two are the same text after normalisation, or exactly the same rational number.

    Symmetric and transitive, since it compares `answer_key` of both sides.
    """
    return answer_key(gold) == answer_key(answer)


def answer_key(answer: str) -> Fraction | str:
    """A hashable form that equal answers share: a number where it is one, else normalised text.

    Numbers: integers, decimals and simple fractions (`3/4`, `\\frac{3}{4}`, `\\frac34`), with a
    sign, leading zeros and thousands separators (`1,000`, `1{,}000`). Text: NFKC, U+2212 to `-`,
    invisible format characters dropped, enclosing `$`, LaTeX spacing and sizing dropped, `\\dfrac`
    to `\\frac`, white space canonical. Superscripts and fraction characters keep their meaning
    (`5\u00b2` is `5^{2}`, not 52).
    """
    text = answer.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return text
    text = normalised_text(text)
    number = _as_fraction(text) if len(text) <= MAX_NUMBER_CHARS else None
    return text if number is None else number


def normalised_text(text: str) -> str:
    """The text as `answer_key` compares it."""
    text = text if text.isascii() else ascii_forms(text)
    text = _DROPPED_LATEX.sub("", text)
    text = _SPACE_LATEX.sub(" ", text)
    text = _FRACTION_LATEX.sub(r"\\frac", text).replace("{,}", ",")
    text = _without_math_delimiters(text.strip())
    text = _CURRENCY.sub(r"\1", _FINAL_STOP.sub("", text))
    return _REDUNDANT_SPACE.sub("", _SPACES.sub(" ", text)).strip()


def ascii_forms(text: str) -> str:
    """NFKC that keeps meanings: superscripts and fraction characters stay what they are."""
    # NFKC alone would read a superscript as a plain digit and 1 followed by one half as 11/2.
    pieces = []
    for char in text:
        kind = unicodedata.decomposition(char).partition(" ")[0]
        if kind in ("<super>", "<sub>"):
            mark = "^" if kind == "<super>" else "_"
            pieces.append(f"{mark}{{{unicodedata.normalize('NFKC', char)}}}")
        elif kind == "<fraction>":
            pieces.append(f" {unicodedata.normalize('NFKC', char)} ")
        elif unicodedata.category(char) != "Cf":
            pieces.append(char)
    text = unicodedata.normalize("NFKC", "".join(pieces))
    return text.replace(_MINUS_SIGN, "-").replace(_FRACTION_SLASH, "/")


def _without_math_delimiters(text: str) -> str:
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        long_enough = len(text) > len(opening) + len(closing)
        if long_enough and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            is_one_formula = opening not in inner.replace("\\$", "")
            return inner.strip() if is_one_formula else text
    return text


def _as_fraction(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal or a simple fraction; None for anything else."""
    match = _PLAIN.fullmatch(text)
    if match is not None:
        sign, top, bottom_sign, bottom = match.groups()
        minus_signs = [sign, bottom_sign].count("-")
    else:
        match = _LATEX.fullmatch(text)
        if match is None:
            return None
        sign, short_top, short_bottom, top_sign, long_top, bottom_sign, long_bottom = match.groups()
        top, bottom = short_top or long_top, short_bottom or long_bottom
        minus_signs = [sign, top_sign, bottom_sign].count("-")
    denominator = Fraction(1) if bottom is None else Fraction(bottom.replace(",", ""))
    if denominator == 0:
        return None
    value = Fraction(top.replace(",", "")) / denominator
    return -value if minus_signs % 2 else value
