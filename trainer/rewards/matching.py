"""Whether an answer equals the gold: normalised text first, then exact rational arithmetic.

No floating point, no evaluation of model text, no tolerance: 0.3333 is not 1/3, and 5\\% is not 5.
Every step is linear in the answer's length, and long answers are compared as they stand.
"""

from __future__ import annotations

import re
from fractions import Fraction

from trainer.math_answers.normalisation import normalised_text

MAX_ANSWER_CHARS = 2000
"""Longer answers are only compared character by character."""
MAX_NUMBER_CHARS = 500
"""Longer numbers are compared as text, which keeps big-integer work small."""

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
