"""Answers as plain text in one spelling; every step is linear in the length."""

from __future__ import annotations

import re
import unicodedata

_MINUS_SIGN, _FRACTION_SLASH = "\u2212", "\u2044"
_DROPPED_LATEX = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\!|(?<=\d)\\,(?=\d{3}(?!\d))")
_SPACE_LATEX = re.compile(r"\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~")
_FRACTION_LATEX = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_CURRENCY = re.compile(r"^([+-]?)\\?\$(?=[\d.])")
_FINAL_STOP = re.compile(r"(?<=[\w})\]])\.$")
_SPACES = re.compile(r"\s+")
_REDUNDANT_SPACE = re.compile(r"(?<!\w) | (?!\w)")


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
