"""Reads an answer or a gold: as a choice letter, as words, as mathematics. Nothing is computed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from trainer.math_answers.normalisation import ascii_forms, normalised_text
from trainer.math_answers.parser import parse
from trainer.math_answers.tree import AnswerError, Node, UnreadableError, UnsupportedError
from trainer.math_answers.vocabulary import ABBREVIATIONS, PHRASES, TEXT_COMMANDS, UNICODE_COMMANDS

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*",
    re.IGNORECASE,
)
_WORDED = re.compile(r"\\text\s*\{([^{}]*[Aa]nswer[^{}]*)\}")
_ALIGNMENT = re.compile(
    r"\\begin\s*\{((?:align(?:ed)?|gather(?:ed)?|equation|split)\*?)\}(.*?)\\end\s*\{\1\}",
    re.DOTALL,
)
_CURRENCY = re.compile(r"\\?\$|\\(?:pounds|euro|textdollar)(?![A-Za-z])|[€£¥]")
_THIN_SPACE = re.compile(
    r",?\\!|(?<=\d)\{,\}(?=\d{3}(?!\d))|(?<=\d)\\[,;:](?=\d{3}(?!\d))|(?<=\d)~(?=\d{3}(?!\d))"
)
_STYLE = re.compile(rf"\\(?:{'|'.join(sorted(TEXT_COMMANDS))}|bf|rm|displaystyle)\*?(?![A-Za-z])")
_FINAL_MARKS = re.compile(r"(?:\s|[,;:]|(?<!\.)\.|\\\\|\\[,;:! ])+$")
_FRENCH_INTERVAL = re.compile(r"([\[\]])([^\[\]()]+[,;][^\[\]()]+)([\[\]])")
_WHITE_SPACE = re.compile(r"(?:\s|\\[,;:! ]|~)+")
_CHOICE = re.compile(r"(\()?\s*([A-Ja-j])\s*(?(1)\)|[.):]?)\s*(.*)", re.DOTALL)
_WORDS = re.compile(
    r"[Nn][Oo]|[A-Za-z0-9\s.,;:'\"()&/-]*[A-Za-z]{3}[A-Za-z0-9\s.,;:'\"()&/-]*", re.ASCII
)
_ARTICLE = re.compile(r"\b(?:the|a|an)\b")
_DECIMAL_COMMA = re.compile(r"([+-]?)(\d{1,3}(?:\.\d{3})+|\d+),(\d+)", re.ASCII)
_THOUSANDS_COMMA = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)
_LETTER_UNIT = re.compile(r"(.*[\d})])\s+[mgshLNJWVAKC]")
_NAMED = re.compile(r"(?P<name>[^=<>+*/\d]*[A-Za-z][^=<>+*/\d]*)=(?P<value>[^=<>]+)")
_HAS_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a text says: any of its readings that exist."""

    text: str
    """Normalised, with the commands of text style left out."""
    words: str | None
    """Its words in lower case, where it is made of words."""
    choice: str | None
    """The letter, where it may be the letter of a choice."""
    is_marked_choice: bool
    """The letter has a mark: `(B)`, `B.`."""
    readings: tuple[Node, ...]
    """As mathematics; several where the notation is ambiguous."""
    numbers: tuple[Node, ...]
    """Read as a number in a way that only a number as gold suggests: `3,5` or `5 m`."""
    failure: AnswerError | None
    """Why it has no reading as mathematics."""


@lru_cache(maxsize=4096)
def read_answer(text: str) -> Answer:
    """All readings of a text; never raises."""
    math = _math_text(text)
    plain = _WHITE_SPACE.sub(" ", re.sub("[{}]", "", _STYLE.sub("", math))).strip()
    choice, is_marked, rest = _choice(plain)
    failure: AnswerError | None = None
    readings: tuple[Node, ...] = ()
    try:
        readings = _readings(math)
    except AnswerError as error:
        failure = error
    if choice is not None and rest:
        try:
            readings, failure = (*_readings(_math_text(rest)), *readings), None
        except AnswerError as error:
            failure = failure and error
    return Answer(
        text=_STYLE.sub("", normalised_text(math)),
        words=_words(plain),
        choice=choice,
        is_marked_choice=is_marked,
        readings=readings,
        numbers=tuple(
            node for node in (_decimal_comma(math), _with_letter_unit(math)) if node is not None
        ),
        failure=failure,
    )


def why_unusable(text: str) -> str | None:
    """Why a text cannot serve as a gold, in one clause; None when it can."""
    answer = read_answer(text)
    if answer.readings or answer.words or answer.choice:
        return None
    if isinstance(answer.failure, UnsupportedError):
        return None
    if isinstance(answer.failure, UnreadableError) and _is_balanced(text) and _says_something(text):
        return None
    return f"it cannot be read: {answer.failure}"


def _math_text(text: str) -> str:
    text = text.strip().translate(UNICODE_COMMANDS)
    text = text if text.isascii() else ascii_forms(text)
    worded = _WORDED.match(text)
    text = f"{worded[1]} {text[worded.end() :]}" if worded is not None else text
    text = _LEAD_IN.sub("", text, count=1) if _LEAD_IN.match(text) else text
    while (box := _BOX.fullmatch(text.strip())) is not None and _is_balanced(box[1]):
        text = box[1]
    text = text.replace("\\left<", "\\langle ").replace("\\right>", "\\rangle ")
    text = _ALIGNMENT.sub(lambda match: _lines(match[2]), text.replace("\\\\%", "\\%"))
    text = text.replace("\\(", "").replace("\\)", "")
    text = re.sub(r"\\\[|\\\](?!\d)", "", text) if "\\begin" not in text else text
    text = _THIN_SPACE.sub("", _CURRENCY.sub("", text)).replace("{,}", ",")
    text = text.strip().strip("*").strip() if text.strip().startswith("**") else text
    return _FINAL_MARKS.sub("", text).strip()


def _lines(aligned: str) -> str:
    lines = [line.replace("&", " ").strip() for line in aligned.split("\\\\")]
    return ", ".join(line for line in lines if line)


def _readings(text: str) -> tuple[Node, ...]:
    if not text:
        raise UnreadableError("nothing is there")
    phrase = PHRASES.get(" ".join(_STYLE.sub("", text).strip("{} ").lower().split()))
    if phrase is not None:
        return (phrase,)
    french = _FRENCH_INTERVAL.fullmatch(text)
    if french is not None and (french[1], french[3]) != ("[", "]"):
        opening, closing = {"[": "[", "]": "("}[french[1]], {"[": ")", "]": "]"}[french[3]]
        text = f"{opening}{french[2]}{closing}"
    try:
        readings = [parse(text)]
    except UnsupportedError:
        raise
    except UnreadableError:
        named = _NAMED.fullmatch(text)
        if named is None:
            raise
        text = named["value"]
        readings = [parse(text)]
    if "/" in text:
        readings.append(parse(text, tight=True))
    if _HAS_THOUSANDS.search(text):
        readings.append(parse(text, thousands=False))
    return tuple(dict.fromkeys(readings))


def _choice(text: str) -> tuple[str | None, bool, str]:
    """The letter of a choice, whether it has a mark, and what follows it."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None, False, ""
    bracket, letter, rest = match.groups()
    is_marked = bracket is not None or text[1:2] in (".", ")", ":")
    if rest and not (is_marked and letter.isupper()):
        return None, False, ""
    return letter, is_marked, rest


def _words(text: str) -> str | None:
    if _WORDS.fullmatch(text) is None:
        return None
    text = re.sub(r"(?<=[a-z])['-](?=[a-z])", "", text.lower())
    text = re.sub(r"[.,;:'\"()&](?!\d)|(?<!\d)-", " ", text)
    words = " ".join(_ARTICLE.sub(" ", text).split())
    return ABBREVIATIONS.get(words, words) or None


def _decimal_comma(text: str) -> Node | None:
    match = _DECIMAL_COMMA.fullmatch(text)
    if match is None or _THOUSANDS_COMMA.fullmatch(text):
        return None
    sign, whole, decimals = match.groups()
    value = Fraction(f"{whole.replace('.', '')}.{decimals}")
    return Node("num", value=-value if sign == "-" else value)


def _with_letter_unit(text: str) -> Node | None:
    match = _LETTER_UNIT.fullmatch(text)
    if match is None:
        return None
    try:
        return parse(match[1])
    except AnswerError:
        return None


def _is_balanced(text: str) -> bool:
    depth = 0
    for piece in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(piece, 0)
        if depth < 0:
            return False
    return depth == 0


def _says_something(text: str) -> bool:
    return re.search(r"[^\W_]", re.sub(r"\\[A-Za-z]+", "", text)) is not None
