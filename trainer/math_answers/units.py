"""Units of measure in the words after a number."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from trainer.math_answers.vocabulary import MULTIPLIERS, UNITS

_PIECE = re.compile(r"[A-Za-z]+|-?\d+|/")
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER_POWERS = {"squared": 2, "cubed": 3}

Dimension = tuple[tuple[str, int], ...]


def multiplier_of(unit: str) -> tuple[int, str]:
    """The factor that the unit begins with, as in "million dollars", and the rest of it."""
    first, _, rest = unit.partition(" ")
    factor = MULTIPLIERS.get(first.lower())
    return (1, unit) if factor is None else (factor, rest)


def dimension_of(unit: str) -> tuple[Dimension, Fraction] | None:
    """Powers of the base dimensions, and the factor to base units; None for other words."""
    powers: Counter[str] = Counter()
    factor, sign, next_power = Fraction(1), 1, 1
    last: tuple[dict[str, int], Fraction, int] | None = None
    for piece in _PIECE.findall(unit.replace("- ", "-")):
        if piece in ("/", "per"):
            sign = -1
        elif piece in _POWER_WORDS:
            next_power = _POWER_WORDS[piece]
        elif (piece in _AFTER_POWERS or piece.lstrip("-").isdigit()) and last is not None:
            base, scale, power = last
            extra = power * (_AFTER_POWERS.get(piece) or _small(piece)) - power
            powers.update({name: exponent * extra for name, exponent in base.items()})
            factor *= scale**extra
            last = None
        elif piece in UNITS or piece.lower() in UNITS:
            base, scale = UNITS[piece] if piece in UNITS else UNITS[piece.lower()]
            power = sign * next_power
            powers.update({name: exponent * power for name, exponent in base.items()})
            factor *= scale**power
            last, next_power = (base, scale, power), 1
        else:
            return None
    return tuple(sorted((name, power) for name, power in powers.items() if power)), factor


def same_words(left: str, right: str) -> bool:
    """Whether two units are written the same but for case, spaces and a plural s."""
    return _bare(left) == _bare(right)


def share_a_word(left: str, right: str) -> bool:
    """Whether a word stands in both: "ways" and "different ways"."""
    words = [{_bare(word) for word in unit.split()} for unit in (left, right)]
    return bool(words[0] & words[1])


def _bare(unit: str) -> str:
    return re.sub(r"[\s{}*.]", "", unit.lower()).removesuffix("s")


def _small(exponent: str) -> int:
    return max(-9, min(9, int(exponent[:3])))
